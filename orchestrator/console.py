"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.units import duration, human_bytes


class JsonScreen:
    """Every event as one JSON line on standard output."""

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        Console(soft_wrap=True, highlight=False, emoji=False).print(
            json.dumps({"event": event, **fields}), markup=False
        )

    def __enter__(self) -> JsonScreen:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Screen:
    """Progress and a line per round."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._clients = self._progress.add_task("clients", total=1, visible=False)
        self._failures, self._traced, self._told_alone = 0, False, False

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        handler = getattr(self, f"_on_{event}", None)
        if handler:
            handler(fields)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _on_checkpoint_damaged(self, fields: Mapping[str, Any]) -> None:
        self._say(
            f"[yellow]checkpoint passed over:[/] {escape(fields['reason'])}; going on from round {fields['round']}"
        )

    def _on_plugins_changed(self, fields: Mapping[str, Any]) -> None:
        files = escape(", ".join(fields["files"]))
        self._say(f"[yellow]plug-in changed:[/] rounds up to {fields['round']} were played with another {files}")

    def _on_already_finished(self, fields: Mapping[str, Any]) -> None:
        self._say(f"{escape(fields['folder'])} is already finished; --overwrite runs it again")

    def _on_ranks_equalised(self, fields: Mapping[str, Any]) -> None:
        self._say(f"{fields['strategy']} needs equal ranks: every client trains at the smallest, rank {fields['rank']}")

    def _on_copy_failed(self, fields: Mapping[str, Any]) -> None:
        self._say(f"[yellow]not copied[/] after round {fields['round']}: {escape(fields['reason'])}; tried again later")

    def _on_fleet(self, fields: Mapping[str, Any]) -> None:
        speed, band = fields["examples_per_s"], fields["mbit_per_s"]
        self._say(
            f"simulated devices: {speed['slowest']:.3g} to {speed['fastest']:.3g} examples/s (median"
            f" {speed['median']:.3g}), {band['slowest']:.3g} to {band['fastest']:.3g} Mbit/s; times are virtual"
        )

    def _on_cohorts(self, fields: Mapping[str, Any]) -> None:
        if fields["alone"]:
            self._say(f"clients train one after another, not in one pass: {fields['alone']}")

    def _on_trained_alone(self, fields: Mapping[str, Any]) -> None:
        if not self._told_alone:
            self._say(f"[yellow]a cohort was taken apart[/] in round {fields['round']}: {escape(fields['reason'])}")
        self._told_alone = True

    def _on_attackers(self, fields: Mapping[str, Any]) -> None:
        self._say(f"[yellow]attack:[/] {escape(describe_attack(fields['attack'], fields['clients']))}")

    def _on_store_down(self, fields: Mapping[str, Any]) -> None:
        self._say(f"[yellow]{escape(fields['url'])} does not answer;[/] the run goes on, its folder is all it needs")

    def _on_store_up(self, fields: Mapping[str, Any]) -> None:
        self._say(f"{escape(fields['url'])} answers again")

    def _on_privacy_planned(self, fields: Mapping[str, Any]) -> None:
        self._say(f"client-level privacy: {escape(fields['text'])}")

    def _on_local_privacy_planned(self, fields: Mapping[str, Any]) -> None:
        self._say(f"local privacy: {escape(fields['text'])}")

    def _on_secure_sum_planned(self, fields: Mapping[str, Any]) -> None:
        self._say(f"secure aggregation: {escape(fields['text'])}")

    def _on_budget_spent(self, fields: Mapping[str, Any]) -> None:
        self._say(
            f"[yellow]the privacy budget is spent:[/] epsilon {fields['epsilon']:.3f} after round {fields['round']};"
            f" another round would exceed {fields['budget']:g}"
        )

    def _on_run_silent(self, fields: Mapping[str, Any]) -> None:
        self._say("[yellow]nobody plays this run now;[/] waiting until somebody resumes it (Ctrl-C stops the waiting)")

    def _on_pool_starting(self, fields: Mapping[str, Any]) -> None:
        self._say("starting Ray ..." if fields["pool"] == "ray" else "waiting for nodes ...")

    def _on_run_resumed(self, fields: Mapping[str, Any]) -> None:
        self._say(f"resuming after round {fields['round']}")

    def _on_run_started(self, fields: Mapping[str, Any]) -> None:
        clients = fields["clients"]
        ranks = ", ".join(f"rank {rank}: {count}" for rank, count in clients["ranks"].items())
        sizes = f"{clients['smallest']} to {clients['largest']} rows each (median {clients['median']})"
        sizes = f"with {sizes}" if clients["rows"] else "whose rows are still to come"
        self._say(f"{clients['count']} clients {sizes}; {ranks}")
        if fields["initial"] and not fields["round"]:
            self._say(f"before training: {_scores(fields['initial'])}")

    def _on_round_started(self, fields: Mapping[str, Any]) -> None:
        self._progress.update(
            self._clients,
            description=f"round {fields['round']}",
            total=fields["wanted"],
            completed=0,
            visible=True,
        )

    def _on_update_admitted(self, fields: Mapping[str, Any]) -> None:
        self._progress.advance(self._clients)

    def _on_update_refused(self, fields: Mapping[str, Any]) -> None:
        self._incident("refused", fields)

    def _on_client_failed(self, fields: Mapping[str, Any]) -> None:
        self._incident("failed", fields)

    def _on_update_late(self, fields: Mapping[str, Any]) -> None:
        self._progress.advance(self._clients)  # over-selection leaves somebody out in every round

    def _incident(self, what: str, fields: Mapping[str, Any]) -> None:
        self._progress.advance(self._clients)
        self._failures += 1
        if self._failures <= 5:
            self._say(
                f"[yellow]{what}[/] {escape(fields['client'])} in round {fields['round']}: {escape(fields['reason'])}"
            )
        if fields.get("traceback") and not self._traced:
            self._traced = True
            self._say(f"[dim]{escape(fields['traceback'].rstrip())}[/]")
        if self._failures == 5:
            self._say("further failures are counted in the round lines and kept in journal.jsonl")

    def _on_round_committed(self, fields: Mapping[str, Any]) -> None:
        line = f"round {fields['round']:>3}  "
        line += f"{escape(fields['stream']['task'])}  " if fields.get("stream") else ""
        line += describe_learned(fields)
        if fields["eval"]:
            line += f"  held out: {_scores(fields['eval'])}"
        if fields["clients"]:
            spread = fields["clients"]["accuracy"]
            line += f"  clients {spread['worst']:.2f} / {spread['median']:.2f} / {spread['best']:.2f}"
        line += f"  epsilon {fields['strategy']['epsilon']:.3f}" if "epsilon" in fields["strategy"] else ""
        lost = len(fields["refused"]) + len(fields["failed"]) + len(fields["late"])
        line += f"  [yellow]not used:[/] {escape(fields['problem'])}" if fields.get("problem") else ""
        line += f"  {len(fields['admitted'])} of {len(fields['selected'])} updates" if lost else ""
        if fields["clock_s"] is not None:
            line += f"  at {duration(fields['clock_s'])} of virtual time"
        self._say(f"{line}  {sum(fields['seconds'].values()):.1f} s")
        if fields["dropped_rows"] and fields["round"] == 1:
            self._say(f"[yellow]{fields['dropped_rows']} rows[/] have no token to learn from within data.max_length")

    def _on_shift(self, fields: Mapping[str, Any]) -> None:
        self._say(f"[cyan]shift:[/] the losses of round {fields['round']} say that the data have changed")

    def _on_awaiting_rows(self, fields: Mapping[str, Any]) -> None:
        self._say(f"waiting for rows: {fields['rows']} have come, round {fields['round']} needs {fields['needed']}")

    def _on_stream_ended(self, fields: Mapping[str, Any]) -> None:
        self._say(
            f"[yellow]no more rows came[/] ({fields['rows']}, the next round needs {fields['needed']}); ending after"
            f" round {fields['round']}, and resuming goes on when there are more"
        )

    def _on_task_ended(self, fields: Mapping[str, Any]) -> None:
        why = fields["evidence"].get("reason") or "its loss has settled"
        self._say(f"[cyan]{escape(fields['task'])}[/] ended with round {fields['round']} ({why})")

    def _on_shard_finished(self, fields: Mapping[str, Any]) -> None:
        self._say(f"[cyan]shard {fields['shard']}[/] of {fields['shards']} finished: {_scores(fields['final'])}")

    def _on_unlearning(self, fields: Mapping[str, Any]) -> None:
        self._say(f"{fields['request']}: {fields['phase']}")

    def _on_frozen(self, fields: Mapping[str, Any]) -> None:
        why = fields["evidence"].get("reason") or fields["evidence"]["policy"]
        self._say(f"[cyan]frozen[/] after round {fields['round']} ({why}); a fresh adapter starts")


def describe_attack(name: str, attackers: Sequence[str]) -> str:
    """``sign_flip by c3, c7``; of a large group, the first twenty."""
    more = f" and {len(attackers) - 20} more" if len(attackers) > 20 else ""
    return f"{name} by {', '.join(attackers[:20])}{more}"


def print_summary(console: Console, summary: Mapping[str, Any], folder: str) -> None:
    """The end of a run in a few lines."""
    metric = summary.get("metric", "accuracy")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (
        ("status", summary["status"]),
        ("strategy", summary.get("strategy")),
        (f"{metric} before", _share(summary.get("initial"))),
        (f"{metric} after", _share(summary.get("final"))),
        ("loss before, after", f"{_loss(summary.get('initial'))}, {_loss(summary.get('final'))}"),
        *_stream_lines(summary.get("stream")),
        *_shard_lines(summary.get("shards")),
        *_privacy_lines(summary.get("privacy")),
        *_local_lines(summary.get("local_privacy")),
        ("rounds", summary.get("rounds")),
        (
            "bytes up, down",
            f"{_size(summary.get('bytes_up'))}, {_size(summary.get('bytes_down'))}",
        ),
        ("wall time", f"{summary.get('wall_s', 0):.1f} s"),
        ("peak memory", f"{summary.get('peak_rss_mb', 0):.0f} MB"),
        ("adapter", f"{folder}/adapter  sha256 {str(summary.get('adapter_sha256'))[:16]}"),
        ("report", f"{folder}/report.html"),
    ):
        table.add_row(name, escape(str(value)))
    console.print(table)


def _stream_lines(stream: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a stream came to: accuracy at the end, on average along the way, and what was forgotten."""
    if not stream:
        return []
    known = {name: value for name, value in stream["metrics"].items() if value is not None}
    frozen = ", ".join(map(str, stream["freezes"])) or "never"
    return [
        ("tasks", ", ".join(stream["tasks"])),
        ("over the stream", ", ".join(f"{name} {100 * value:.1f} %" for name, value in known.items())),
        ("frozen after rounds", frozen),
    ]


def _shard_lines(shards: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How good the model of every shard is by itself."""
    told = [f"{len(one['clients'])} clients {_share(one['final'])}" for one in (shards or {}).values()]
    return [("shards", ", ".join(told))] if told else []


def _privacy_lines(privacy: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What was spent, and whether that ended the run."""
    if not privacy:
        return []
    ended = f", which the budget of {privacy['budget']:g} ended" if privacy["ended_by_budget"] else ""
    text = f"epsilon {privacy['epsilon']:.3f} at delta {privacy['delta']:g} for a client, {privacy['rounds']} rounds"
    return [("privacy", text + ended)]


def _local_lines(privacy: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the client that was asked most often has spent."""
    if not privacy:
        return []
    text = f"epsilon {privacy['epsilon']:.3f} at delta {privacy['delta']:g} for the client that was asked most often"
    return [("local privacy", text)]


def describe_learned(row: Mapping[str, Any]) -> str:
    """What a round's clients say of their training."""
    if row["train"]:
        return f"train loss {row['train']['loss']:.4f}"
    return "no usable update" if row["problem"] or not row["admitted"] else f"{len(row['admitted'])} updates"


def _scores(scores: Mapping[str, float]) -> str:
    return f"loss {scores['loss']:.4f}, {100 * scores['accuracy']:.1f} % right"


def _share(scores: Mapping[str, float] | None) -> str:
    return f"{scores['accuracy']:.4f}" if scores else "-"


def _loss(scores: Mapping[str, float] | None) -> str:
    return f"{scores['loss']:.4f}" if scores else "-"


def _size(count: float | None) -> str:
    return "-" if count is None else human_bytes(count)
