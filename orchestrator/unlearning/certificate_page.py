"""A certificate as a page for people: everything the statement says, in the look of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.report.markup import document, escape, folded, plural, soft, table

_TONES = {"A": "interrupted", "S": "failed"}  # the report's classes; green for what may be called erasure


def certificate_page(statement: Mapping[str, Any]) -> str:
    """One HTML file, complete in itself; the same statement gives the same text."""
    request, level = statement["request"], statement["level"]
    title = f"Certificate of unlearning {request['id']}"
    tone = _TONES.get(level["code"], "finished")
    sections = {
        "What was asked": _request(statement),
        "What the level means": f"<p>{escape(level['meaning'])}</p>",
        "Verification": _verdict(statement["verdict"]),
        "Artefacts": _artefacts(**statement["artefacts"]),
        "Purged": _purged(statement["purged"]),
        "What is not promised": _listed(statement["residual_risk"]),
        "Where it is anchored": _anchors(statement),
    }
    body = "".join(f"<section><h2>{part}</h2>{content}</section>\n" for part, content in sections.items())
    head = f'<h1>{escape(title)}<span class="status {tone}">level {escape(level["code"])}</span></h1>'
    target = f"{request['kind']} {', '.join(request['target'][:5])}{' …' if len(request['target']) > 5 else ''}"
    about = soft(f"{target} · {statement['action']} · issued {statement['issued']}")
    return document(f"{title} – FedLoRA", f"{head}\n{about}\n{body}")


def _request(statement: Mapping[str, Any]) -> str:
    request = statement["request"]
    urgency = "contain first, erase after" if request["now"] else "erase"
    facts = [
        ["Kind", request["kind"]],
        ["Asked for", f"{request['action'] or 'the action that the plan chooses'}, {urgency}"],
        ["Carried out", statement["action"]],
        ["By key", request["requested_by"]],
        *([phase.capitalize(), time] for phase, time in request["times"].items()),
    ]
    targets = folded(plural(len(request["target"]), "target"), _listed(request["target"]))
    return table(["", ""], "ll", facts) + targets


def _verdict(verdict: Mapping[str, Any]) -> str:
    other = {name: value for name, value in verdict.items() if name != "checks"}
    lines = [[path, str(value)] for path, value in _leaves(other)]
    facts = table(["Metric", "Value"], "ll", lines) if lines else soft("No verification was recorded.")
    return facts + (_checks(verdict["checks"]) if "checks" in verdict else "")


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """What the gate measured: a model that never saw the target may be as far from the control as the margin says."""
    head = ["Check", "Value", "Control", "Controls differ by", "Margin", "Rows", "", "Why"]
    numbers = ("value", "control", "noise", "margin")
    lines = [
        [
            check["name"],
            *(f"{float(check[number]):.3g}" for number in numbers),
            f"{check['n']:,}",
            "passed" if check["passed"] else "failed",
            check["reason"],
        ]
        for check in checks
    ]
    return table(head, "lrrrrrll", lines)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of nested data by its dotted path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{place}]")
    else:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else value


def _artefacts(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    def fate(path: str) -> str:
        if path not in before or path not in after:
            return "new" if path in after else "removed"
        return "unchanged" if before[path] == after[path] else "changed"

    paths = sorted({*before, *after})
    fates = [fate(path) for path in paths]
    lines = [[path, what, before.get(path, "–"), after.get(path, "–")] for path, what in zip(paths, fates, strict=True)]
    counts = ", ".join(f"{fates.count(what):,} {what}" for what in ("changed", "new", "removed", "unchanged"))
    shown = table(["Path", "", "SHA-256 before", "SHA-256 after"], "llll", lines)
    return soft(f"{plural(len(paths), 'file')}: {counts}.") + folded("Every file", shown)


def _purged(purged: Mapping[str, str]) -> str:
    if not purged:
        return soft("Nothing had to be removed beyond what was replaced.")
    return table(["What", "SHA-256"], "ll", [[path, digest or "no file"] for path, digest in purged.items()])


def _listed(sentences: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _anchors(statement: Mapping[str, Any]) -> str:
    journal, log = statement["journal"], statement["log"]
    lines = [
        ["Run", statement["request"]["run"]],
        [f"Journal, first {journal['bytes']:,} bytes", journal["sha256"]],
        [f"Request log, {plural(log['records'], 'record')}", log["head"]],
        ["Signed by key", statement["issuer"]],
    ]
    note = "The signature is in the JSON file beside this page; it covers this page too. Hashes are SHA-256."
    return table(["", ""], "ll", lines) + soft(note)
