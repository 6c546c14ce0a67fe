"""Charts of a run as SVG inside HTML figures, in colours that follow the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from orchestrator.report.markup import decimal, escape, figure, legend, percent, plural, soft
from orchestrator.units import human_bytes

Record = Mapping[str, Any]

_FEW = 40  # clients or labels that bars can still tell apart

# Stand-ins that become CSS variables in the SVG, so that charts follow the page into dark mode.
INK, _FAINT, _BLUE, _ORANGE, _TEAL = "#010101", "#020202", "#030303", "#040404", "#050505"
_NAMES = {INK: "ink", _FAINT: "faint", _BLUE: "blue", _ORANGE: "orange", _TEAL: "teal"}
_THEME = {stand_in: f"var(--{name})" for stand_in, name in _NAMES.items()}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 8,
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
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


def curves(rounds: Sequence[Record], initial: Record | None, metric: str) -> str:
    """Losses, scores and bytes over the rounds; ``initial`` holds the scores before the first."""
    if not rounds:
        return soft("No round has been committed yet, so there is nothing to draw.")
    scored, trained, local = (_recorded(rounds, key) for key in ("eval", "train", "clients"))
    if initial:
        scored.insert(0, (0, initial))
    spread = [(number, record.get("accuracy") or {}) for number, record in local]
    loss, score = {"loss": ("held-out", _BLUE)}, {"accuracy": ("held-out", _BLUE)}
    steps = {"first_loss": ("first step", _ORANGE), "loss": ("mean of all steps", _BLUE)}
    ways = {"median": ("median", _BLUE), "p10": ("10th percentile", _TEAL), "worst": ("worst", _ORANGE)}
    count = plural(max((record.get("count") or 0 for _, record in local), default=0), "client")
    charts = [
        _lines("loss", "Held-out loss", scored, loss),
        _lines("metric", f"Held-out {metric}", scored, score, share=True),
        _lines("train", "Training loss", trained, steps),
        _lines("spread", f"{metric.capitalize()} on clients' own rows ({count})", spread, ways, share=True),
        _bytes_chart(rounds),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def partition(clients: Sequence[Record]) -> str:
    """How many rows of which label the clients have: bars for a few clients, a heat map for many."""
    if not clients:
        return soft("No partition was recorded.")
    rows = [client.get("num_examples") or 0 for client in clients]
    heldout = sum(client.get("num_heldout") or 0 for client in clients)
    text = (
        f"{plural(len(clients), 'client')} with {sum(rows):,} rows to train on ({min(rows):,} to {max(rows):,} each,"
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
    return f'{soft(text)}<div class="charts">{charts}</div>'


def colour(index: int) -> str:
    """Colours that neighbours do not share: golden-ratio steps around the wheel, of varying strength."""
    return to_hex(hsv_to_rgb(((0.58 + 0.618 * index) % 1, 0.62 - 0.12 * (index % 3), 0.76 - 0.1 * (index % 2))))


def _recorded(rounds: Sequence[Record], key: str) -> list[tuple[int, Record]]:
    return [(row["round"], row[key]) for row in rounds if row.get(key)]


def _lines(
    key: str,
    title: str,
    records: Sequence[tuple[int, Record]],
    series: Mapping[str, tuple[str, str]],
    share: bool = False,
) -> str:
    """A line over the rounds for every field of ``series``, which gives its name and colour."""
    x = [number for number, _ in records]
    values = {field: np.array([real(record.get(field)) for _, record in records]) for field in series}
    values = {field: y for field, y in values.items() if np.isfinite(y).any()}
    if not values:
        return figure(title, soft("Not recorded so far."))

    def draw(axes: Any) -> None:
        for field, y in values.items():
            axes.plot(x, y, color=series[field][1], marker="o" if len(x) <= _FEW else "")
        if {"worst", "median"} <= values.keys():
            axes.fill_between(x, values["worst"], values["median"], color=_BLUE, alpha=0.15, linewidth=0)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        round_axis(axes, x)

    show = percent if share else decimal
    ends = [f"{series[f][0]} {show(y[0])} in round {x[0]}, {show(y[-1])} in round {x[-1]}" for f, y in values.items()]
    colours = {name: _THEME[stand_in] for name, stand_in in (series[field] for field in values)}
    above = legend(colours) if len(series) > 1 else ""
    return figure(title, above + svg(key, f"{title} by round: {'; '.join(ends)}.", draw))


def _bytes_chart(rounds: Sequence[Record]) -> str:
    x = [row["round"] for row in rounds]
    up, down = (np.array([row.get(key) or 0 for row in rounds], dtype=float) for key in ("bytes_up", "bytes_down"))

    def draw(axes: Any) -> None:
        edges = [x[0] - 0.5, *(number + 0.5 for number in x)]
        axes.stairs(up, edges, fill=True, color=_BLUE, alpha=0.8)
        axes.stairs(-down, edges, fill=True, color=_ORANGE, alpha=0.8)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: human_bytes(abs(size))))
        round_axis(axes, x)

    alt = f"Bytes by round: {human_bytes(up.mean())} up and {human_bytes(down.mean())} down on average."
    above = legend({"up, from clients": _THEME[_BLUE], "down, to clients": _THEME[_ORANGE]})
    return figure("Bytes by round", above + svg("bytes", alt, draw))


def round_axis(axes: Any, x: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.set_xlabel("round")


def _bars(names: Sequence[str], labels: Sequence[str], counts: np.ndarray) -> str:
    colours = [colour(i) for i in range(len(labels))] or [_BLUE]

    def draw(axes: Any) -> None:
        left = np.zeros(len(names))
        for fill, column in zip(colours, counts.T, strict=True):
            some = np.flatnonzero(column)
            axes.barh(some, column[some], left=left[some], color=fill, height=0.78)
            left += column
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        axes.set_yticks(range(len(names)), short, parse_math=False)  # a client may be called $x$
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("rows")

    title = "Rows by client and label" if labels else "Rows by client"
    alt = ", ".join(f"{name} {total:,}" for name, total in zip(names, counts.sum(axis=1), strict=True))
    above = legend(dict(zip(labels, colours, strict=True))) if labels else ""
    return figure(title, above + svg("bars", f"{title}: {alt}.", draw, height=0.7 + 0.17 * len(names)))


def _heat_map(counts: np.ndarray) -> str:
    # 10,000 clients are more than the picture has pixels: neighbours share a line
    lines = np.array([block.mean(axis=0) for block in np.array_split(counts, min(len(counts), 400))])
    image = np.empty((*lines.shape, 4))
    image[..., :3] = to_rgb(colour(0))
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
    return figure("Rows by client and label", soft(note) + svg("heat", alt, draw, height=3.2))


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
    return figure("How many rows clients have", svg("rows", alt, draw, height=3.2))


def svg(key: str, alt: str, draw: Callable[[Any], None], height: float = 2.3) -> str:
    """An SVG element to embed beside others; ``key`` keeps its ids apart from theirs."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}), warnings.catch_warnings():
        # the browser's fonts draw the text; matplotlib's own only measures it
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        canvas = FigureCanvasSVG(Figure(figsize=(4.8, height), dpi=200, layout="constrained"))
        draw(canvas.figure.subplots())
        canvas.print_svg(buffer, metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    _, box, body = re.split(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', buffer.getvalue(), maxsplit=1)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    for stand_in, variable in _THEME.items():
        body = body.replace(f": {stand_in}", f": {variable}")
    return f'<svg role="img" aria-label="{escape(alt)}" {box}>{body}'


def real(value: float | None) -> float:
    """``value``, or NaN (a gap in a line) for what cannot be drawn."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
