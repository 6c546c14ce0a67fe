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
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

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

    @property
    def metric(self) -> str:
        return self.summary.get("metric") or "score"


def _read_run(folder: Path) -> _Run:
    path = folder / "config.yaml"
    source = _read(path)
    if source is None:
        raise RunFolderError(f"{folder} is not a run folder: it has no config.yaml; give the output_dir of a run")
    try:
        text = source.decode()
        config = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} is not valid YAML; restore it or run again") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path} must hold a mapping of keys, not {type(config).__name__}")
    return _Run(
        config=config,
        config_text=text,
        summary=_read_json(folder / "summary.json", dict) or {},
        clients=_read_json(folder / "partition.json", list) or [],
        rounds=_read_lines(folder / "metrics.jsonl") or [],
        journal=_read_lines(folder / "journal.jsonl"),
    )


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


# --- the page ------------------------------------------------------------------------------------------


def _page(run: _Run) -> str:
    name = _text(run.summary.get("name") or run.config.get("name") or "unnamed run")
    status = _text(run.summary.get("status") or "under way")
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
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} – FedLoRA run</title><style>{_CSS}</style></head><body>
<h1>{name}<span class="status {status}">{status}</span></h1>
{_soft(" · ".join(fact for fact in facts if fact))}
{_key_figures(run)}
{body}</body></html>
"""


def _key_figures(run: _Run) -> str:
    if not (end := run.summary):
        return _soft("There is no summary.json yet: the run is under way, or it ended without writing one.")
    initial, final, best, base = (end.get(key) or {} for key in ("initial", "final", "best", "base"))
    planned, memory = run.config.get("rounds"), end.get("peak_rss_mb")
    figures = [
        (f"Final {run.metric}", _percent(final.get("accuracy")), f"{_percent(initial.get('accuracy'))} at the start"),
        ("Final loss", _loss(final.get("loss")), f"{_loss(initial.get('loss'))} at the start"),
        ("Best round", _number(best.get("round")), f"{_percent(best.get('accuracy'))}, loss {_loss(best.get('loss'))}"),
        ("Rounds", _number(end.get("rounds")), f"of {_number(planned)} planned"),
        ("Wall time", _duration(end.get("wall_s")), "start to end"),
        ("Bytes up", _size(end.get("bytes_up")), "from clients"),
        ("Bytes down", _size(end.get("bytes_down")), "to clients"),
        ("Trained on", _number(end.get("train_tokens")), "tokens"),
        ("Peak memory", "–" if memory is None else f"{memory:,.0f} MB", "resident"),
        ("Base model", _number(base.get("parameters")), f"parameters, {_number(base.get('sites'))} sites"),
    ]
    hashes = [("Adapter SHA-256", "adapter_sha256"), ("Configuration SHA-256", "config_sha256")]
    tile = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>".format
    tiles = [tile(*map(_text, figure)) for figure in figures]
    wide = [tile(title, _text(end.get(key) or "–"), "") for title, key in hashes]
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
    head, foot = ["Round", "Selected", "Admitted", "Up", "Down", "Both"], cells("all", rounds)
    if len(rounds) <= 30:
        return _table(head, "rrrrrr", table, foot)
    middle = rounds[5:-20]
    table[5:-20] = [cells(f"{middle[0]['round']} to {middle[-1]['round']}", middle)]
    return _folded(f"First 5 and last 20 of {len(rounds):,} rounds", _table(head, "rrrrrr", table, foot))


def _time(run: _Run) -> str:
    spent = {phase: seconds for phase, seconds in (run.summary.get("seconds") or {}).items() if seconds}
    if not spent:
        return _soft("No times were recorded.")
    if (other := (run.summary.get("wall_s") or 0) - sum(spent.values())) > 0:
        spent["other"] = other
    total, rounds = sum(spent.values()), max(len(run.rounds), 1)
    table = [[phase, _duration(s), _percent(s / total), _duration(s / rounds)] for phase, s in spent.items()]
    foot = ["all", _duration(total), "", _duration(total / rounds)]
    colours = {phase: _colour(i) for i, phase in enumerate(spent)}
    bar = "".join(f'<i style="flex:{s / total:.4f};background:{colours[phase]}"></i>' for phase, s in spent.items())
    return (
        f'<div class="split" aria-hidden="true">{bar}</div>'
        + _legend(colours)
        + _table(["Phase", "Time", "Share", "Per round"], "lrrr", table, foot)
    )


def _incidents(journal: Sequence[Record] | None) -> str:
    if journal is None:
        return _soft("This folder has no journal.jsonl, so incidents are unknown.")
    events = [event for event in journal if event.get("event") in _INCIDENTS]
    if not events:
        return _soft("No update was refused, no client failed, and the run was not interrupted.")
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
    kinds = Counter(_INCIDENTS[event["event"]] for event in events)
    text = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    text += "; the first 200 are listed, the others are in journal.jsonl." if len(events) > 200 else "."
    return _soft(text) + _table(["Time", "Round", "Client", "What", "Reason"], "lrlll", table)


# --- charts --------------------------------------------------------------------------------------------


def _curves(run: _Run) -> str:
    if not run.rounds:
        return _soft("No round has been committed yet, so there is nothing to draw.")
    scored, trained, local = (_recorded(run.rounds, key) for key in ("eval", "train", "clients"))
    if run.summary.get("initial"):
        scored.insert(0, (0, run.summary["initial"]))
    spread = [(number, record.get("accuracy") or {}) for number, record in local]
    loss, score = {"loss": ("held-out", _BLUE)}, {"accuracy": ("held-out", _BLUE)}
    steps = {"first_loss": ("first step", _ORANGE), "loss": ("mean of all steps", _BLUE)}
    ways = {"median": ("median", _BLUE), "p10": ("10th percentile", _TEAL), "worst": ("worst", _ORANGE)}
    count = _count(max((record.get("count") or 0 for _, record in local), default=0), "client")
    charts = [
        _lines("loss", "Held-out loss", scored, loss),
        _lines("metric", f"Held-out {run.metric}", scored, score, percent=True),
        _lines("train", "Training loss", trained, steps),
        _lines("spread", f"{run.metric.capitalize()} on clients' own rows ({count})", spread, ways, percent=True),
        _bytes_chart(run.rounds),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _recorded(rounds: Sequence[Record], key: str) -> list[tuple[int, Record]]:
    return [(row["round"], row[key]) for row in rounds if row.get(key)]


def _lines(
    key: str,
    title: str,
    records: Sequence[tuple[int, Record]],
    series: Mapping[str, tuple[str, str]],
    percent: bool = False,
) -> str:
    """A line over the rounds for every field of ``series``, which gives its name and colour."""
    x = [number for number, _ in records]
    values = {field: np.array([_real(record.get(field)) for _, record in records]) for field in series}
    values = {field: y for field, y in values.items() if np.isfinite(y).any()}
    if not values:
        return _figure(title, _soft("Not recorded so far."))

    def draw(axes: Any) -> None:
        for field, y in values.items():
            axes.plot(x, y, color=series[field][1], marker="o" if len(x) <= _FEW else "")
        if {"worst", "median"} <= values.keys():
            axes.fill_between(x, values["worst"], values["median"], color=_BLUE, alpha=0.15, linewidth=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        _round_axis(axes, x)

    show = _percent if percent else _loss
    ends = [f"{series[f][0]} {show(y[0])} in round {x[0]}, {show(y[-1])} in round {x[-1]}" for f, y in values.items()]
    legend = _legend(dict(series[field] for field in values)) if len(series) > 1 else ""
    return _figure(title, legend + _svg(key, f"{title} by round: {'; '.join(ends)}.", draw))


def _bytes_chart(rounds: Sequence[Record]) -> str:
    x = [row["round"] for row in rounds]
    up, down = (np.array([row.get(key) or 0 for row in rounds], dtype=float) for key in ("bytes_up", "bytes_down"))

    def draw(axes: Any) -> None:
        edges = [x[0] - 0.5, *(number + 0.5 for number in x)]
        axes.stairs(up, edges, fill=True, color=_BLUE, alpha=0.8)
        axes.stairs(-down, edges, fill=True, color=_ORANGE, alpha=0.8)
        axes.axhline(0, color=_INK, linewidth=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(abs(size))))
        _round_axis(axes, x)

    alt = f"Bytes by round: {_size(up.mean())} up and {_size(down.mean())} down on average."
    legend = _legend({"up, from clients": _BLUE, "down, to clients": _ORANGE})
    return _figure("Bytes by round", legend + _svg("bytes", alt, draw))


def _round_axis(axes: Any, x: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
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
    tables = [client.get("label_counts") or {} for client in clients]
    labels = sorted(set().union(*tables))
    counts = np.array([[table.get(label, 0) for label in labels] for table in tables])
    if not labels:
        text += " Label counts were not recorded: the rows have no labels, or clients keep them private."
        counts = np.array([rows]).T
    if max(len(clients), len(labels)) <= _FEW:
        charts = _bars([str(client.get("client")) for client in clients], labels, counts)
    else:
        charts = (_heat_map(counts) if labels else "") + _histogram(rows)
    return f'{_soft(text)}<div class="charts">{charts}</div>'


def _bars(names: Sequence[str], labels: Sequence[str], counts: np.ndarray) -> str:
    colours = [_colour(i) for i in range(len(labels))] or [_BLUE]

    def draw(axes: Any) -> None:
        left = np.zeros(len(names))
        for colour, column in zip(colours, counts.T, strict=True):
            some = np.flatnonzero(column)
            axes.barh(some, column[some], left=left[some], color=colour, height=0.78)
            left += column
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        axes.set_yticks(range(len(names)), short, parse_math=False)  # a client may be called $x$
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("rows")

    title = "Rows by client and label" if labels else "Rows by client"
    alt = ", ".join(f"{name} {total:,}" for name, total in zip(names, counts.sum(axis=1), strict=True))
    legend = _legend(dict(zip(labels, colours, strict=True))) if labels else ""
    return _figure(title, legend + _svg("bars", f"{title}: {alt}.", draw, height=0.7 + 0.17 * len(names)))


def _heat_map(counts: np.ndarray) -> str:
    # 10,000 clients are more than the picture has pixels: neighbours share a line
    lines = np.array([block.mean(axis=0) for block in np.array_split(counts, min(len(counts), 400))])
    image = np.empty((*lines.shape, 4))
    image[..., :3] = to_rgb(_colour(0))
    image[..., 3] = np.sqrt(lines / max(lines.max(), 1e-9))
    clients, labels = counts.shape

    def draw(axes: Any) -> None:
        axes.imshow(image, aspect="auto", extent=(0.5, labels + 0.5, clients + 0.5, 0.5))
        axes.grid(visible=False)
        for axis, name in ((axes.xaxis, "label"), (axes.yaxis, "client")):
            axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            axis.set_label_text(name)

    median = np.median((counts > 0).sum(axis=1))
    alt = f"Heat map of {clients:,} clients and {labels:,} labels; the median client has {median:.0f} of them."
    note = f"Stronger is more rows; the most that one client has of one label is {counts.max():,.0f}."
    if len(lines) < clients:
        note += f" A line is the mean of about {clients / len(lines):.0f} clients."
    return _figure("Rows by client and label", _soft(note) + _svg("heat", alt, draw, height=3.2))


def _histogram(rows: Sequence[int]) -> str:
    least, most = min(rows), max(rows)

    def draw(axes: Any) -> None:
        clients, edges = np.histogram(rows, min(30, most - least + 1), (least - 0.5, most + 0.5))
        axes.stairs(clients, edges, fill=True, color=_BLUE)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
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
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    _, box, body = re.split(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', buffer.getvalue(), maxsplit=1)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    for colour in _THEME:
        body = body.replace(f": {colour}", f": {_THEME[colour]}")
    return f'<svg role="img" aria-label="{_text(alt)}" {box}>{body}'


# --- pieces of HTML ------------------------------------------------------------------------------------


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{_text(title)}</figcaption>{content}</figure>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _legend(colours: Mapping[str, str]) -> str:
    item = '<li><i style="background:{}"></i>{}</li>'.format
    items = [item(_THEME.get(colour, colour), _text(name)) for name, colour in colours.items()]
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


def _colour(index: int) -> str:
    """Colours that neighbours do not share: golden-ratio steps around the wheel, of varying strength."""
    return to_hex(hsv_to_rgb(((0.58 + 0.618 * index) % 1, 0.62 - 0.12 * (index % 3), 0.76 - 0.1 * (index % 2))))


# --- text ----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


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


_INCIDENTS = {
    "update_refused": "refused",
    "client_failed": "failed",
    "run_resumed": "resumed",
    "run_interrupted": "interrupted",
}
_FEW = 40  # clients or labels that bars can still tell apart

# Stand-ins that become CSS variables in the SVG, so that charts follow the page into dark mode.
_INK, _FAINT, _BLUE, _ORANGE, _TEAL = "#010101", "#020202", "#030303", "#040404", "#050505"
_NAMES = {_INK: "ink", _FAINT: "faint", _BLUE: "blue", _ORANGE: "orange", _TEAL: "teal"}
_THEME = {stand_in: f"var(--{name})" for stand_in, name in _NAMES.items()}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 8,
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], _INK),
    **dict.fromkeys(["axes.edgecolor", "grid.color"], _FAINT),
    **dict.fromkeys(["axes.facecolor", "figure.facecolor"], "none"),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "axes.spines.left"], False),
    **dict.fromkeys(["xtick.major.size", "ytick.major.size"], 0),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
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
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0 0 }
@media (min-width: 60rem) { dl { grid-template-columns: repeat(5, 1fr) } }
dl div { padding: .6rem .8rem; border-radius: .4rem; background: var(--card) }
dt, dd small { color: var(--soft); font-size: .8rem } dd small { display: block }
dd { margin: 0; font-size: 1.25rem; line-height: 1.35 }
.hashes { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); margin-top: .6rem }
.hashes dd { font: .72rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
figure { display: flex; flex-direction: column; max-width: 38rem; margin: 0 } figcaption { font-weight: 600 }
svg { display: block; width: 100%; height: auto; margin-top: auto }
svg text { font-family: inherit !important }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 .4rem; padding: 0; list-style: none;
  color: var(--soft); font-size: .8rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: 2px }
.split { display: flex; height: .8rem; margin: .4rem 0; border-radius: 3px; overflow: hidden }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--faint); max-width: 30rem; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 500; white-space: nowrap } tfoot td { border: 0; font-weight: 600 }
.r { text-align: right } .r, td:first-child { white-space: nowrap } summary { cursor: pointer }
pre { padding: 1rem; border-radius: .4rem; background: var(--card); overflow-x: auto;
  font: .8rem/1.5 ui-monospace, monospace }
"""
