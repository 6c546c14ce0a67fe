"""The page: reads a run folder and puts its sections together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import RunFolderError
from orchestrator.report.charts import Record, colour, curves, partition
from orchestrator.report.markup import (
    decimal,
    document,
    escape,
    folded,
    integer,
    legend,
    or_dash,
    percent,
    plural,
    soft,
    table,
)
from orchestrator.report.stream import stream
from orchestrator.stores.files import read_json, read_lines, write_atomic
from orchestrator.units import duration, human_bytes

_INCIDENTS = {
    "update_refused": "refused",
    "client_failed": "failed",
    "update_late": "late",
    "run_resumed": "resumed",
    "run_interrupted": "interrupted",
}


def write_report(folder: Path) -> Path:
    """Write ``report.html``, complete in itself; the same folder gives the same bytes.

    Args:
        folder: of a run, finished or under way. Only ``config.yaml`` must be there.

    Returns:
        Path of the report.

    Raises:
        RunFolderError: if this is not a run folder, a file in it is malformed, or it cannot be written to.
    """
    try:
        run = _read_run(folder)
    except OSError as error:
        raise RunFolderError(f"cannot read {error.filename}: {error.strerror}") from error
    target = folder / "report.html"
    # half a surrogate pair is legal in JSON and impossible in UTF-8
    write_atomic(target, _page(run).encode("utf-8", "xmlcharrefreplace"))
    return target


@dataclass(frozen=True)
class _Run:
    """A run folder as read; ``journal`` is None without the file, which is not the same as no incident."""

    config: Record
    config_text: str
    summary: Record
    clients: Sequence[Record]
    rounds: Sequence[Record]
    journal: Sequence[Record] | None

    @property
    def metric(self) -> str:
        return self.summary.get("metric") or "score"


def _read_run(folder: Path) -> _Run:
    config, text = _read_config(folder)
    return _Run(
        config=config,
        config_text=text,
        summary=_value(folder / "summary.json", dict) or {},
        clients=_value(folder / "partition.json", list) or [],
        rounds=_records(folder / "metrics.jsonl") or [],
        journal=_records(folder / "journal.jsonl"),
    )


def _read_config(folder: Path) -> tuple[Record, str]:
    """Keys and text, not checked against today's schema: the report of an older run can still be drawn."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunFolderError(f"{folder} is not a run folder (no config.yaml in it); give the output_dir of a run")
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is not valid YAML; restore it or run again") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path} must hold a mapping of keys, not {type(config).__name__}")
    return config, text


def _value(path: Path, kind: type) -> Any:
    return _checked(read_json(path), kind, str(path)) if path.exists() else None


def _records(path: Path) -> list[Record] | None:
    if not path.exists():
        return None
    return [_checked(line, dict, f"every line of {path}") for line in read_lines(path)]


def _checked(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind):
        raise RunFolderError(f"{place} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def _page(run: _Run) -> str:
    title = run.summary.get("name") or run.config.get("name") or "unnamed run"
    name = escape(title)
    status = escape(run.summary.get("status") or "under way")
    data = (run.config.get("data") or {}).get("name")
    facts = [run.summary.get("strategy"), run.summary.get("model"), data, plural(len(run.clients), "client")]
    sections = {
        "Curves": curves(run.rounds, run.summary.get("initial"), run.metric),
        "The stream": stream(run.rounds, run.journal or (), run.summary.get("stream")),
        "Shards": _shards(run.summary.get("shards")),
        "Clients and their data": partition(run.clients),
        "Ranks": _ranks(run),
        "Bytes by round": _traffic(run.rounds),
        "Time": _time(run),
        "Incidents": _incidents(run.journal),
        "Configuration": folded("config.yaml", f"<pre>{escape(run.config_text)}</pre>"),
    }
    body = "".join(f"<section><h2>{part}</h2>{content}</section>\n" for part, content in sections.items() if content)
    head = f'<h1>{name}<span class="status {status}">{status}</span></h1>'
    about = soft(" · ".join(fact for fact in facts if fact))
    return document(f"{title} – FedLoRA run", "\n".join((head, about, _key_figures(run), body)))


def _key_figures(run: _Run) -> str:
    if not (end := run.summary):
        return soft("There is no summary.json yet: the run is under way, or it ended without writing one.")
    initial, final, best, base = (end.get(key) or {} for key in ("initial", "final", "best", "base"))
    figures = [
        (f"Final {run.metric}", percent(final.get("accuracy")), f"{percent(initial.get('accuracy'))} at the start"),
        ("Final loss", decimal(final.get("loss")), f"{decimal(initial.get('loss'))} at the start"),
        (
            "Best round",
            integer(best.get("round")),
            f"{percent(best.get('accuracy'))}, loss {decimal(best.get('loss'))}",
        ),
        ("Rounds", integer(end.get("rounds")), f"of {integer(run.config.get('rounds'))} planned"),
        ("Wall time", or_dash(end.get("wall_s"), duration), "start to end"),
        ("Bytes up", or_dash(end.get("bytes_up"), human_bytes), "from clients"),
        ("Bytes down", or_dash(end.get("bytes_down"), human_bytes), "to clients"),
        ("Trained on", integer(end.get("train_tokens")), "tokens"),
        ("Peak memory", or_dash(end.get("peak_rss_mb"), "{:,.0f} MB".format), "resident"),
        ("Base model", integer(base.get("parameters")), f"parameters, {integer(base.get('sites'))} sites"),
    ]
    if end.get("clock_s") is not None:
        figures.append(("Virtual time", duration(end["clock_s"]), "of the simulated devices"))
    if privacy := end.get("privacy"):
        why = f"; the budget of {privacy['budget']:g} ended the run" if privacy["ended_by_budget"] else ""
        figures.append(("Epsilon", decimal(privacy["epsilon"]), f"at delta {privacy['delta']:g}, for a client{why}"))
    if local := end.get("local_privacy"):
        about = f"at delta {local['delta']:g}, for the client asked most often"
        figures.append(("Local epsilon", decimal(local["epsilon"]), about))
    hashes = [("Adapter SHA-256", "adapter_sha256"), ("Configuration SHA-256", "config_sha256")]
    tile = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>".format
    tiles = [tile(*map(escape, figure)) for figure in figures]
    wide = [tile(title, escape(end.get(key) or "–"), "") for title, key in hashes]
    return f'<dl>{"".join(tiles)}</dl><dl class="hashes">{"".join(wide)}</dl>'


def _shards(shards: Record | None) -> str:
    if not shards:
        return ""
    lines = []
    for number, one in shards.items():
        final = one["final"] or {}
        counts = [integer(len(one["clients"])), integer(one["rows"])]
        lines.append([number, *counts, percent(final.get("accuracy")), decimal(final.get("loss"))])
    note = soft("Each was trained by its own clients alone. Rounds below are those of all shards together.")
    return table(["Shard", "Clients", "Rows", "Score", "Loss"], "rrrrr", lines) + note


def _ranks(run: _Run) -> str:
    if not run.clients:
        return soft("No partition was recorded, so the ranks of the clients are unknown.")
    rank_of = {client["client"]: client["rank"] for client in run.clients}
    admitted = [Counter(rank_of.get(client) for client in row.get("admitted") or ()) for row in run.rounds]
    lines = []
    for rank in sorted(set(rank_of.values())):
        examples = [client.get("num_examples") or 0 for client in run.clients if client["rank"] == rank]
        updates = [row[rank] for row in admitted if row[rank]]
        lines.append([integer(cell) for cell in (rank, len(examples), sum(examples), len(updates), sum(updates))])
    note = soft("Rounds are those that admitted an update of this rank.")
    return table(["Rank", "Clients", "Rows", "Rounds", "Updates"], "rrrrr", lines) + note


def _traffic(rounds: Sequence[Record]) -> str:
    if not rounds:
        return soft("No round has been committed yet.")

    def cells(label: str, rows: Sequence[Record]) -> list[str]:
        people = [sum(len(row.get(key) or ()) for row in rows) for key in ("selected", "admitted")]
        sizes = [sum(row.get(key) or 0 for row in rows) for key in ("bytes_up", "bytes_down")]
        return [label, *map(integer, people), *map(human_bytes, (*sizes, sum(sizes)))]

    lines = [cells(str(row["round"]), [row]) for row in rounds]
    head, foot = ["Round", "Selected", "Admitted", "Up", "Down", "Both"], cells("all", rounds)
    if len(rounds) <= 30:
        return table(head, "rrrrrr", lines, foot)
    middle = rounds[5:-20]
    lines[5:-20] = [cells(f"{middle[0]['round']} to {middle[-1]['round']}", middle)]
    return folded(f"First 5 and last 20 of {len(rounds):,} rounds", table(head, "rrrrrr", lines, foot))


def _time(run: _Run) -> str:
    spent = {phase: seconds for phase, seconds in (run.summary.get("seconds") or {}).items() if seconds}
    if not spent:
        return soft("No times were recorded.")
    if (other := (run.summary.get("wall_s") or 0) - sum(spent.values())) > 0:
        spent["other"] = other
    total, rounds = sum(spent.values()), max(len(run.rounds), 1)
    lines = [[phase, duration(s), percent(s / total), duration(s / rounds)] for phase, s in spent.items()]
    foot = ["all", duration(total), "", duration(total / rounds)]
    colours = {phase: colour(i) for i, phase in enumerate(spent)}
    bar = "".join(f'<i style="flex:{s / total:.4f};background:{colours[phase]}"></i>' for phase, s in spent.items())
    return (
        f'<div class="split" aria-hidden="true">{bar}</div>'
        + legend(colours)
        + table(["Phase", "Time", "Share", "Per round"], "lrrr", lines, foot)
    )


def _incidents(journal: Sequence[Record] | None) -> str:
    if journal is None:
        return soft("This folder has no journal.jsonl, so incidents are unknown.")
    events = [event for event in journal if event.get("event") in _INCIDENTS]
    if not events:
        return soft("No update was refused, no client failed, and the run was not interrupted.")
    kinds = Counter(_INCIDENTS[event["event"]] for event in events)
    # over-selection makes late updates by the hundred: they must not push a failure off the page
    shown = sorted(events, key=lambda event: event["event"] == "update_late")[:200]
    lines = [
        [
            str(event.get("time") or "–")[:19].replace("T", " "),
            integer(event.get("round")),
            event.get("client") or "–",
            _INCIDENTS[event["event"]],
            event.get("reason") or "–",
        ]
        for event in shown
    ]
    text = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    text += (
        "; the first 200 are listed, late ones last, and the others are in journal.jsonl." if len(events) > 200 else "."
    )
    return soft(text) + table(["Time", "Round", "Client", "What", "Reason"], "lrlll", lines)
