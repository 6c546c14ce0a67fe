"""A stream of tasks in the report: every task's score over the rounds, and the matrix of what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from fedlora.continual.metrics import Scores
from orchestrator.report.charts import INK, Record, colour, real, round_axis, svg
from orchestrator.report.markup import escape, figure, legend, percent, soft, table

_NAMES = {
    "ACC": "accuracy over all tasks at the end",
    "AIA": "accuracy on the tasks met so far, on average along the way",
    "forgetting": "best earlier score of a task less its last one, on average",
    "BWT": "last score of a task less the one right after it was learned",
    "FWT": "score of a task right before it is learned less the one before training",
    "learning_accuracy": "score of a task right after it was learned",
}


def stream(rounds: Sequence[Record], journal: Sequence[Record], end: Record | None) -> str:
    """The section; empty for a run without a stream.

    Args:
        end: what the summary says of the stream, once there is one.
    """
    looked = [(row["round"], row["stream"]["accuracy"]) for row in rounds if (row.get("stream") or {}).get("accuracy")]
    if not looked:
        return ""
    # a round that was repeated after a crash has two lines
    frozen = list({line["round"]: line for line in journal if line.get("event") == "frozen"}.values())
    parts = [_curves(looked, [line["round"] for line in frozen]), _matrix(rounds, end), _freezes(frozen)]
    return "".join(parts)


def _curves(looked: Sequence[tuple[int, Record]], frozen: Sequence[int]) -> str:
    tasks = list(looked[-1][1])
    x = [number for number, _ in looked]
    colours = {task: colour(place) for place, task in enumerate(tasks)}

    def draw(axes: Any) -> None:
        for task in tasks:
            axes.plot(x, [real(scores.get(task)) for _, scores in looked], color=colours[task], marker="o")
        for number in frozen:
            axes.axvline(number + 0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        round_axis(axes, x)

    ends = [f"{task} {percent(looked[-1][1].get(task))}" for task in tasks]
    alt = f"Score of every task by round; in round {x[-1]}: {', '.join(ends)}."
    note = soft("Dotted: the adapter was frozen and a fresh one started.") if frozen else ""
    return figure("Score of every task", legend(colours) + svg("tasks", alt, draw) + note)


def _matrix(rounds: Sequence[Record], end: Record | None) -> str:
    told = [row for row in rounds if row.get("stream")]
    # the last look at every task it was the turn of
    last = {row["stream"]["task"]: row["stream"]["accuracy"] for row in told if row["stream"].get("accuracy")}
    tasks = list(next(iter(last.values())))
    initial = end["initial"] if end else None
    rows = ([("before", initial)] if initial else []) + [
        (f"after {task}", [scores.get(other) for other in tasks]) for task, scores in last.items()
    ]
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(map(_cell, scores))}</tr>" for name, scores in rows)
    heat = f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{body}</table></div>'
    known = Scores(tuple(tuple(scores) for name, scores in rows if name != "before"), initial and tuple(initial))
    metrics = [(name, percent(value), _NAMES[name]) for name, value in known.describe().items() if value is not None]
    return f"<h3>R[t, i]: score on every task after every task</h3>{heat}" + table(
        ["", "", "what it is"], "lrl", metrics
    )


def _cell(score: float | None) -> str:
    strength = 0 if score is None else round(70 * min(max(score, 0.0), 1.0))
    shade = f"color-mix(in srgb, var(--blue) {strength}%, transparent)"
    return f'<td class="r" style="background:{shade}">{percent(score)}</td>'


def _freezes(frozen: Sequence[Record]) -> str:
    if not frozen:
        return ""
    rows = []
    for line in frozen:
        evidence = [item for item in line["evidence"].items() if item[0] not in ("round", "policy", "ignored")]
        why = ", ".join(f"{name} {_short(value)}" for name, value in evidence)
        rows.append((str(line["round"]), str(line["evidence"].get("policy", "")), why))
    return "<h3>When the adapter was frozen, and why</h3>" + table(["after round", "policy", "evidence"], "rll", rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
