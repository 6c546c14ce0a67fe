"""The report of a run: one HTML file, drawn only from what the run left in its folder."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlora.errors import RunFolderError

Record = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``report.html``, complete in itself; the same folder gives the same bytes.

    Args:
        folder: of a run, finished or under way. Only ``config.yaml`` must be there.

    Returns:
        Path of the report.

    Raises:
        RunFolderError: if this is not a run folder, a file in it is malformed, or it cannot be written to.
    """
    page = _page(_read_run(folder))
    target, unfinished = folder / "report.html", folder / f".report-{os.getpid()}.html"
    try:
        # half a surrogate pair is legal in JSON and impossible in UTF-8
        unfinished.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
        unfinished.replace(target)
    except OSError as error:
        raise RunFolderError(f"cannot write {target}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


# --- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A run folder as read; ``journal`` is None without the file, which is not the same as no incident."""

    config: Record
    config_text: str
    summary: Record
    clients: Sequence[Record]
    rounds: Sequence[Record]
    journal: Sequence[Record] | None


def _read_run(folder: Path) -> _Run:
    path = folder / "config.yaml"
    source = _read(path)
    if source is None:
        raise RunFolderError(
            f"{folder} is not a run folder: it has no config.yaml; give the output_dir of a run"
        )
    try:
        text = source.decode()
        config = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is not valid YAML; restore it or run again") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path} must hold a mapping of keys, not {type(config).__name__}")
    clients = _read_json(folder / "partition.json", list) or []
    rounds = _read_lines(folder / "metrics.jsonl") or []
    summary = _read_json(folder / "summary.json", dict) or _so_far(config, rounds)
    return _Run(config, text, summary, clients, rounds, _read_lines(folder / "journal.jsonl"))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error


def _read_json(path: Path, kind: type) -> Any:
    content = _read(path)
    return None if content is None else _parse(content, kind, str(path))


def _read_lines(path: Path) -> list[Record] | None:
    content = _read(path)
    if content is None:
        return None
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    records = []
    for number, line in lines:
        try:
            records.append(_parse(line, dict, f"{path}, line {number}"))
        except RunFolderError:
            # a crash while appending tears the last line; every line before it was whole
            if number != lines[-1][0]:
                raise
    return records


def _parse(content: bytes, kind: type, place: str) -> Any:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise RunFolderError(f"{place} is not valid JSON ({error}); restore the file or run again") from error
    if not isinstance(value, kind):
        raise RunFolderError(f"{place} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def _so_far(config: Record, rounds: Sequence[Record]) -> Record:
    """What ``summary.json`` would say, as far as the committed rounds tell."""
    scored = [{"round": row["round"], **row["eval"]} for row in rounds if row.get("eval")]
    strategy = config.get("strategy")
    seconds = [row.get("seconds") or {} for row in rounds]
    return {
        "status": "under way",
        "strategy": next(iter(strategy), None) if isinstance(strategy, dict) else strategy,
        "model": (config.get("model") or {}).get("name"),
        "rounds": len(rounds),
        "final": scored[-1] if scored else None,
        "best": max(
            scored, key=lambda row: (_real(row.get("accuracy")), -_real(row.get("loss"))), default=None
        ),
        "seconds": {phase: sum(row.get(phase) or 0 for row in seconds) for phase in _PHASES},
        **{
            key: sum(row.get(key) or 0 for row in rounds)
            for key in ("bytes_up", "bytes_down", "train_tokens")
        },
    }


# --- the page ------------------------------------------------------------------------------------------


def _page(run: _Run) -> str:
    name = _text(run.summary.get("name") or run.config.get("name") or "unnamed run")
    status = run.summary.get("status") or "unknown"
    mood = status if status in ("finished", "interrupted", "failed") else ""
    data = (run.config.get("data") or {}).get("name")
    facts = [run.summary.get("strategy"), run.summary.get("model"), data, _count(len(run.clients), "client")]
    sections = {
        "Curves": _curves(run),
        "Clients and their data": _partition(run.clients),
        "Ranks": _ranks(run),
        "Bytes by round": _traffic(run.rounds),
        "Time": _time(run),
        "Incidents": _incidents(run.journal),
        "Configuration": _folded("config.yaml", f"<pre>{_text(run.config_text)}</pre>"),
    }
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} – FedLoRA run</title><style>{_CSS}</style></head><body>
<h1>{name}<span class="status {mood}">{_text(status)}</span></h1>
{_soft(" · ".join(fact for fact in facts if fact))}
{_key_figures(run)}
{body}</body></html>
"""


def _key_figures(run: _Run) -> str:
    summary, metric, planned = run.summary, _metric(run), run.config.get("rounds")
    initial, final, best, base = (summary.get(key) or {} for key in ("initial", "final", "best", "base"))
    figures = [
        (
            f"Final {metric}",
            _percent(final.get("accuracy")),
            f"{_percent(initial.get('accuracy'))} before training",
        ),
        ("Final loss", _loss(final.get("loss")), f"{_loss(initial.get('loss'))} before training"),
        (
            "Best round",
            _number(best.get("round")),
            f"{_percent(best.get('accuracy'))}, loss {_loss(best.get('loss'))}",
        ),
        ("Rounds", _number(summary.get("rounds")), f"of {planned:,} planned" if planned else ""),
        ("Wall time", _duration(summary.get("wall_s")), "hours, minutes, seconds on the clock"),
        ("Bytes up", _size(summary.get("bytes_up")), "from clients to the server"),
        ("Bytes down", _size(summary.get("bytes_down")), "from the server to clients"),
        ("Trained on", _number(summary.get("train_tokens")), "tokens"),
        ("Peak memory", _size((summary.get("peak_rss_mb") or 0) * 1e6 or None), "resident"),
        (
            "Base model",
            _number(base.get("parameters")),
            f"parameters, {_number(base.get('sites'))} adapted modules",
        ),
    ]
    tiles = [
        f"<div><dt>{_text(k)}</dt><dd>{_text(v)}<small>{_text(n)}</small></dd></div>" for k, v, n in figures
    ]
    hashes = [("Adapter SHA-256", "adapter_sha256"), ("Configuration SHA-256", "config_sha256")]
    wide = [f"<div><dt>{title}</dt><dd>{_text(summary.get(key) or '–')}</dd></div>" for title, key in hashes]
    return f'<dl>{"".join(tiles)}</dl><dl class="hashes">{"".join(wide)}</dl>'


def _ranks(run: _Run) -> str:
    if not run.clients:
        return _soft("No partition was recorded, so the ranks of the clients are unknown.")
    rank_of = {client["client"]: client["rank"] for client in run.clients}
    admitted = [Counter(rank_of.get(client) for client in row.get("admitted") or ()) for row in run.rounds]
    table = []
    for rank in sorted(set(rank_of.values())):
        rows = [client.get("num_examples") or 0 for client in run.clients if client["rank"] == rank]
        updates = [row[rank] for row in admitted if row[rank]]
        table.append([_number(cell) for cell in (rank, len(rows), sum(rows), len(updates), sum(updates))])
    note = "Rounds are those that admitted an update of this rank. Bytes are recorded by round, not by rank."
    return _table(["Rank", "Clients", "Rows", "Rounds", "Updates"], "rrrrr", table) + _soft(note)


def _traffic(rounds: Sequence[Record]) -> str:
    if not rounds:
        return _soft("No round has been committed yet.")

    def cells(label: str, rows: Sequence[Record]) -> list[str]:
        people = [sum(len(row.get(key) or ()) for row in rows) for key in ("selected", "admitted")]
        sizes = [sum(row.get(key) or 0 for row in rows) for key in ("bytes_up", "bytes_down")]
        return [label, *map(_number, people), *map(_size, (*sizes, sum(sizes)))]

    table = [cells(str(row["round"]), [row]) for row in rounds]
    if len(rounds) > 30:
        middle = rounds[5:-20]
        table[5:-20] = [cells(f"{middle[0]['round']} to {middle[-1]['round']}", middle)]
    head = ["Round", "Selected", "Admitted", "Up", "Down", "Both"]
    content = _table(head, "rrrrrr", table, cells("all", rounds))
    return (
        _folded(f"The first 5 and the last 20 of {len(rounds):,} rounds", content)
        if len(rounds) > 30
        else content
    )


def _time(run: _Run) -> str:
    seconds = run.summary.get("seconds") or {}
    spent = {phase: seconds[phase] for phase in _PHASES if seconds.get(phase)}
    if not spent:
        return _soft("No times were recorded.")
    if (other := (run.summary.get("wall_s") or 0) - sum(spent.values())) > 0:
        spent["other"] = other
    total, rounds = sum(spent.values()), max(len(run.rounds), 1)
    table = [[phase, _duration(s), _percent(s / total), _duration(s / rounds)] for phase, s in spent.items()]
    foot = ["all", _duration(total), "", _duration(total / rounds)]
    colours = dict(zip((*_PHASES, "other"), (_BLUE, _ORANGE, _TEAL, _HUES[4], _HUES[9]), strict=True))
    bar = "".join(
        f'<span style="width:{100 * s / total:.2f}%;background:{_css(colours[phase])}"></span>'
        for phase, s in spent.items()
    )
    legend = _legend({phase: colours[phase] for phase in spent})
    table_html = _table(["Phase", "Time", "Share", "Per round"], "lrrr", table, foot)
    return f'<div class="split" aria-hidden="true">{bar}</div>{legend}{table_html}'


def _incidents(journal: Sequence[Record] | None) -> str:
    if journal is None:
        return _soft("This folder has no journal.jsonl, so incidents are unknown.")
    events = [event for event in journal if event.get("event") in _INCIDENTS]
    if not events:
        return _soft("No update was refused, no client failed, and the run was not interrupted.")
    text = ", ".join(
        f"{n:,} {_INCIDENTS[kind]}" for kind, n in Counter(event["event"] for event in events).items()
    )
    if len(events) > 200:
        text += "; the first 200 are listed, the others are in journal.jsonl"
    table = [
        [
            str(event.get("time") or "–")[:19].replace("T", " "),
            _number(event.get("round")),
            event.get("client") or "–",
            _INCIDENTS[event["event"]],
            event.get("reason") or "–",
        ]
        for event in events[:200]
    ]
    return _soft(f"{text}.") + _table(["Time", "Round", "Client", "What", "Reason"], "lrlll", table)


# --- charts --------------------------------------------------------------------------------------------


def _curves(run: _Run) -> str:
    if not run.rounds:
        return _soft("No round has been committed yet, so there is nothing to draw.")
    scored = [(row["round"], row["eval"]) for row in run.rounds if row.get("eval")]
    if run.summary.get("initial"):
        scored.insert(0, (0, run.summary["initial"]))
    trained = [(row["round"], row["train"]) for row in run.rounds if row.get("train")]
    asked = [(row["round"], row["clients"]) for row in run.rounds if row.get("clients")]
    spread = [(number, clients.get("accuracy") or {}) for number, clients in asked]
    most = max((clients.get("count") or 0 for _, clients in asked), default=0)
    metric, server = _metric(run), "The global model on the server's held-out rows."
    local = f"The global model on each client's own held-out rows; {_count(most, 'client')}."
    train = "Mean over the clients of a round: at their first step, and over all of their steps."
    charts = [
        _lines("loss", "Held-out loss", server, scored, {"loss": _BLUE}),
        _lines("metric", f"Held-out {metric}", server, scored, {"accuracy": _BLUE}, percent=True),
        _lines("train", "Training loss", train, trained, {"first_loss": _ORANGE, "loss": _BLUE}),
        _lines(
            "spread",
            f"{metric.capitalize()} client by client",
            local,
            spread,
            _SPREAD,
            percent=True,
            band=True,
        ),
        _bytes_chart(run.rounds),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _lines(
    key: str,
    title: str,
    note: str,
    records: Sequence[tuple[int, Record]],
    colours: Mapping[str, str],
    percent: bool = False,
    band: bool = False,
) -> str:
    """A line over the rounds for every key of ``colours``; ``band`` shades from the first to the others."""
    x = [number for number, _ in records]
    values = {name: np.array([_real(record.get(name)) for _, record in records]) for name in colours}
    values = {name: y for name, y in values.items() if np.isfinite(y).any()}
    if not values:
        return _figure(title, _soft("Not recorded so far."))
    show = _percent if percent else _loss
    trends = [
        f"{_NAMES[name]} {show(y[0])} in round {x[0]} and {show(y[-1])} in round {x[-1]}"
        for name, y in values.items()
    ]

    def draw(axes: Any) -> None:
        first, *others = values
        for name, y in values.items():
            axes.plot(x, y, color=colours[name], marker="o" if len(x) <= _FEW else "")
        for name in others if band else ():
            axes.fill_between(x, values[first], values[name], color=colours[first], alpha=0.12, linewidth=0)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
        _round_axis(axes, x)

    legend = _legend({_NAMES[name]: colours[name] for name in values}) if len(colours) > 1 else ""
    return _figure(title, _soft(note) + legend + _svg(key, f"{title} by round: {'; '.join(trends)}.", draw))


def _bytes_chart(rounds: Sequence[Record]) -> str:
    x = [row["round"] for row in rounds]
    up, down = (
        np.array([row.get(key) or 0 for row in rounds], dtype=float) for key in ("bytes_up", "bytes_down")
    )

    def draw(axes: Any) -> None:
        edges = [x[0] - 0.5, *(number + 0.5 for number in x)]
        axes.stairs(up, edges, fill=True, color=_BLUE)
        axes.stairs(-down, edges, fill=True, color=_ORANGE)
        axes.axhline(0, color=_INK, linewidth=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(abs(size))))
        _round_axis(axes, x)

    alt = f"Bytes by round: {_size(up.mean())} up and {_size(down.mean())} down on average."
    legend = _legend({"up, from clients": _BLUE, "down, to clients": _ORANGE})
    return _figure("Bytes by round", legend + _svg("bytes", alt, draw))


def _round_axis(axes: Any, x: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.set_xlabel("round")


def _partition(clients: Sequence[Record]) -> str:
    if not clients:
        return _soft("No partition was recorded.")
    rows = [client.get("num_examples") or 0 for client in clients]
    heldout = sum(client.get("num_heldout") or 0 for client in clients)
    text = (
        f"{_count(len(clients), 'client')} with {sum(rows):,} rows to train on ({min(rows):,} to {max(rows):,} each,"
        f" median {np.median(rows):,.0f}) and {heldout:,} kept for evaluation."
    )
    labels = sorted({label for client in clients for label in client.get("label_counts") or {}})
    if labels:
        index = {label: column for column, label in enumerate(labels)}
        counts = np.zeros((len(clients), len(labels)))
        for row, client in enumerate(clients):
            for label, count in (client.get("label_counts") or {}).items():
                counts[row, index[label]] = count
    else:
        text += " Label counts were not recorded: the rows have no labels, or clients keep them private."
        counts = np.array([rows], dtype=float).T
    if len(clients) <= _FEW and len(labels) <= _FEW:
        charts = _stacks([str(client.get("client")) for client in clients], labels, counts)
    else:
        charts = (_heat_map(counts) if labels else "") + _histogram(rows)
    return f'{_soft(text)}<div class="charts">{charts}</div>'


def _stacks(names: Sequence[str], labels: Sequence[str], counts: np.ndarray) -> str:
    colours = [_label_colour(i) for i in range(len(labels))] or [_BLUE]

    def draw(axes: Any) -> None:
        left = np.zeros(len(names))
        for colour, column in zip(colours, counts.T, strict=True):
            there = column > 0
            axes.barh(np.flatnonzero(there), column[there], left=left[there], color=colour, height=0.78)
            left += column
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        # a client may be called $x$, which is not mathematics
        axes.set_yticks(range(len(names)), short, parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("rows")

    title = "Rows by client and label" if labels else "Rows by client"
    totals = [f"{name} {total:,.0f}" for name, total in zip(names, counts.sum(axis=1), strict=True)]
    legend = _legend(dict(zip(labels, colours, strict=True))) if labels else ""
    chart = _svg("stacks", f"{title}: {', '.join(totals)}.", draw, height=0.7 + 0.17 * len(names))
    return _figure(title, legend + chart)


def _heat_map(counts: np.ndarray) -> str:
    # 10,000 clients are more than the picture has pixels: neighbours share a line
    lines = np.array([block.mean(axis=0) for block in np.array_split(counts, min(len(counts), 400))])
    image = np.empty((*lines.shape, 4))
    image[..., :3] = to_rgb(_HUES[0])
    image[..., 3] = np.sqrt(lines / max(lines.max(), 1e-9))
    clients, labels = counts.shape

    def draw(axes: Any) -> None:
        axes.imshow(image, aspect="auto", extent=(0.5, labels + 0.5, clients + 0.5, 0.5))
        axes.grid(visible=False)
        for axis, name in ((axes.xaxis, "label"), (axes.yaxis, "client")):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_label_text(name)

    median = np.median((counts > 0).sum(axis=1))
    alt = f"Heat map of {clients:,} clients and {labels:,} labels; the median client has {median:.0f} of the labels."
    note = f"Stronger is more rows; the most that one client has of one label is {counts.max():,.0f}."
    return _figure("Rows by client and label", _soft(note) + _svg("heat", alt, draw, height=3.2))


def _histogram(rows: Sequence[int]) -> str:
    least, most = min(rows), max(rows)

    def draw(axes: Any) -> None:
        clients, edges = np.histogram(rows, min(30, most - least + 1), (least - 0.5, most + 0.5))
        axes.stairs(clients, edges, fill=True, color=_BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("rows of a client")
        axes.set_ylabel("clients")

    alt = f"Histogram of rows by client, from {least:,} to {most:,}."
    return _figure("How many rows clients have", _svg("rows", alt, draw, height=3.2))


def _svg(key: str, alt: str, draw: Callable[[Any], None], height: float = 2.3) -> str:
    """An SVG element to embed beside others; ``key`` keeps its ids apart from theirs."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}), warnings.catch_warnings():
        # the browser's fonts draw the text; matplotlib's own only measures it
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(figsize=(4.8, height), dpi=200, layout="constrained")
        draw(figure.subplots())
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    _, opening, body = re.split(r"(<svg [^>]*>)", buffer.getvalue(), maxsplit=1)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    for colour in _THEME:
        body = body.replace(f": {colour}", f": {_css(colour)}")
    box = re.search(r'viewBox="[^"]*"', opening)[0]
    return f'<svg role="img" aria-label="{_text(alt)}" {box}>{body}'


# --- pieces of HTML ------------------------------------------------------------------------------------


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{_text(title)}</figcaption>{content}</figure>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _legend(colours: Mapping[str, str]) -> str:
    items = [
        f'<li><i style="background:{_css(colour)}"></i>{_text(name)}</li>' for name, colour in colours.items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(head: Sequence[str], align: str, rows: Iterable[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """A table whose columns lean left or right as the letters of ``align`` say."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = [' class="r"' if letter == "r" else "" for letter in align]
        return "".join(f"<{tag}{side}>{_text(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    last = f"<tfoot><tr>{line(foot, 'td')}</tr></tfoot>" if foot else ""
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody>{last}</table></div>'


def _soft(sentence: str) -> str:
    return f'<p class="soft">{_text(sentence)}</p>'


def _css(colour: str) -> str:
    return _THEME.get(colour, colour)


def _label_colour(index: int) -> str:
    """Ten hues, then the same ten lighter, darker and lighter still."""
    end, share = ((0, 0), (1, 0.45), (0, 0.4), (1, 0.7))[index // len(_HUES) % 4]
    return to_hex([(1 - share) * part + share * end for part in to_rgb(_HUES[index % len(_HUES)])])


# --- text ----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _metric(run: _Run) -> str:
    return run.summary.get("metric") or "score"


def _real(value: float | None) -> float:
    """``value``, or NaN (a gap in a line) for what cannot be drawn."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(size: float | None) -> str:
    """Bytes in decimal units."""
    if size is None:
        return "–"
    power = min(int(math.log10(size)) // 3, 4) if size >= 1 else 0
    return f"{size / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


_PHASES = ("train", "aggregate", "evaluate", "commit")
_INCIDENTS = {
    "update_refused": "refused",
    "client_failed": "failed",
    "run_resumed": "resumed",
    "run_interrupted": "interrupted",
}
_NAMES = {
    "loss": "all steps",
    "first_loss": "first step",
    "accuracy": "accuracy",
    "median": "median",
    "p10": "10th percentile",
    "worst": "worst",
}
_FEW = 40  # clients or labels that bars can still tell apart

# Stand-ins that become CSS variables in the SVG, so that charts follow the page into dark mode.
_INK, _FAINT, _BLUE, _ORANGE, _TEAL = "#010101", "#020202", "#030303", "#040404", "#050505"
_THEME = {
    _INK: "var(--ink)",
    _FAINT: "var(--faint)",
    _BLUE: "var(--blue)",
    _ORANGE: "var(--orange)",
    _TEAL: "var(--teal)",
}
_SPREAD = {"median": _BLUE, "p10": _TEAL, "worst": _ORANGE}
_HUES = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#b07aa1",
    "#76b7b2",
    "#edc948",
    "#9c755f",
    "#ff9da7",
    "#9a9a9a",
)
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 8,
    "text.usetex": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_CSS = """
:root { --paper: #fff; --card: #f6f7f9; --ink: #1d2733; --soft: #5b6775; --faint: #dde2e8;
  --blue: #2f6db3; --orange: #d9772b; --teal: #2a9188; --good: #227a45; --warn: #946200; --bad: #b3372f }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --card: #1d232a; --ink: #e4e9ee; --soft: #9ba7b4; --faint: #353e48;
  --blue: #74abe6; --orange: #eb9c5c; --teal: #5cc2b6; --good: #6cc28b; --warn: #dfb04d; --bad: #f0867d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 2.6rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--faint); font-size: 1.15rem }
.status { margin-left: .6rem; padding: .15em .6em; border: 1px solid; border-radius: 1em; font-size: .8rem;
  font-weight: 500; vertical-align: middle; white-space: nowrap; color: var(--soft) }
.finished { color: var(--good) } .interrupted { color: var(--warn) } .failed { color: var(--bad) }
.soft { margin: .2rem 0 .6rem; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0 0 }
dl div { padding: .6rem .8rem; border-radius: .4rem; background: var(--card) }
dt, dd small { color: var(--soft); font-size: .8rem } dd small { display: block }
dd { margin: 0; font-size: 1.25rem; line-height: 1.35 }
.hashes { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); margin-top: .6rem }
.hashes dd { font: .72rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
figure { display: flex; flex-direction: column; max-width: 38rem; margin: 0 } figcaption { font-weight: 600 }
svg { display: block; width: 100%; height: auto; margin-top: auto } svg text { font-family: inherit !important }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 .4rem; padding: 0; list-style: none;
  color: var(--soft); font-size: .8rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: 2px }
.split { display: flex; height: .8rem; margin: .4rem 0; border-radius: 3px; overflow: hidden }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem 1.1rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--faint); max-width: 30rem; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 500; white-space: nowrap } tfoot td { border: 0; font-weight: 600 }
.r { text-align: right; white-space: nowrap } summary { cursor: pointer }
pre { padding: 1rem; border-radius: .4rem; background: var(--card); overflow-x: auto;
  font: .8rem/1.5 ui-monospace, monospace }
"""
