"""The command line. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora import __version__
from fedlora.errors import ConfigError, FedLoRAError
from orchestrator.flower.commands import app as flower_app
from orchestrator.unlearning.commands import app as unlearn_app

app = typer.Typer(
    name="fedlora",
    help="Federated fine-tuning with LoRA adapters of different ranks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs_app = typer.Typer(help="Look at runs.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
strategies_app = typer.Typer(help="Look at strategies, and check your own.", no_args_is_help=True)
app.add_typer(strategies_app, name="strategies")
app.add_typer(unlearn_app, name="unlearn")
app.add_typer(flower_app, name="flower")

ConfigPath = Annotated[Path, typer.Argument(help="a YAML file, such as configs/quickstart.yaml")]
RunPlace = Annotated[str, typer.Argument(help="a run folder, such as runs/quickstart, or the URL of one")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key; repeatable")]
PluginPaths = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="FILE", help="a Python file that registers more; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="replace an earlier run in the same folder")] = False,
    pool: Annotated[str | None, typer.Option(help="where clients run: local, ray or flower")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="with --pool flower: of the SuperLink")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a configuration. A run that was cut short goes on from its last commit."""
    from fedlora.config import load_config

    if address and pool != "flower":
        raise ConfigError("run: --address goes with --pool flower")
    where = {"pool": pool, "flower.address": address}
    settings = load_config(config, [*(overrides or []), *(f"{key}={value}" for key, value in where.items() if value)])
    from orchestrator import launch

    _play(lambda listen: launch.run(settings, listen, overwrite), settings.output_dir, as_json)


@app.command()
def resume(run: RunPlace, as_json: AsJson = False) -> None:
    """Go on with a run from its last commit."""
    from orchestrator import launch

    _play(lambda listen: launch.resume(run, listen), run, as_json)


@app.command("watch")
def watch_run(
    run: Annotated[str, typer.Argument(help="a run folder, or with a Redis server a run's name or id")],
    redis: Annotated[
        str | None, typer.Option(envvar="FEDLORA_REDIS", help="redis://host:port/0, where the run tells its events")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Follow a run that goes on elsewhere until it ends; the exit code is that of the run."""
    from orchestrator.console import JsonScreen, Screen, print_summary
    from orchestrator.watch import open_source, watch

    source = open_source(run, redis)
    screen: JsonScreen | Screen = JsonScreen() if as_json else Screen()
    with screen:
        code, last = watch(source, screen)
    if isinstance(screen, Screen):
        if code == 0 and (summary := source.summary()):
            print_summary(screen.console, summary, run)
        else:
            _print("finished" if code == 0 else f"{last['event'].removeprefix('run_')}: {last['reason']}")
    if code:
        raise typer.Exit(code)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    follow: Annotated[bool, typer.Option(help="show the log, and submit the job again if it dies")] = True,
    retries: Annotated[int, typer.Option(min=0, help="how often a job that died is submitted again")] = 3,
) -> None:
    """Run a configuration as a job of a Ray cluster, from a copy of this folder. Repeat the command to go on."""
    from orchestrator.submit import prepare
    from orchestrator.submit import submit as hand_in

    order = prepare(config, overrides or [], Path.cwd())
    code = hand_in(order, address, _print, lambda text: typer.echo(text, nl=False), follow, retries)
    if code:
        raise typer.Exit(code)


@app.command()
def compare(
    config: ConfigPath,
    strategies: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="names or YAML stacks; default: the configuration's own")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="runs per row, with the configuration's seed and those after it")
    ] = 1,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="a row for every value of a key; repeatable")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="try the values on the first seed and keep each row's best; repeatable"),
    ] = None,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="folder of the comparison; default: runs/compare-<name>")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at the same time, which share the cores")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run strategies, values and seeds against each other: a table and a picture. Repeat the command to go on."""
    from orchestrator.compare import Request, plan, run
    from orchestrator.compare_screen import ComparisonScreen
    from orchestrator.console import JsonScreen
    from orchestrator.report.compare_page import write_comparison

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    planned = plan(Request(config, strategies, seeds, vary or [], tune or [], overrides or [], to, jobs))
    screen: JsonScreen | ComparisonScreen = JsonScreen() if as_json else ComparisonScreen()
    with screen:
        for comparison in run(planned, screen, shlex.join(["fedlora", *sys.argv[1:]])):
            written = write_comparison(comparison)
    if isinstance(screen, ComparisonScreen):
        screen.print(comparison, written)
    else:
        screen("comparison", comparison)
    if not any(row["finished"] for row in comparison["rows"]):
        raise typer.Exit(1)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a configuration, its data and its model without running it; reports every problem at once."""
    from fedlora.config import load_config

    settings = load_config(config, overrides or [])
    from orchestrator.budget import budget_lines
    from orchestrator.validate import validate as check

    facts, problems = check(settings)
    if as_json:
        _print(json.dumps({"facts": facts, "problems": [str(problem) for problem in problems]}))
    else:
        for name, value in facts.items():
            lines = budget_lines(value) if name == "budget" else [value]
            for title, line in zip([name, *[""] * len(lines)], lines, strict=False):
                _print(f"{title:<10}{line}")
        for problem in problems:
            typer.echo(f"error: {problem}", err=True)
        if not problems:
            _print(f"{config} is valid")
    if problems:
        raise typer.Exit(problems[0].exit_code)


@app.command("eval")
def evaluate(
    run: RunPlace,
    data: Annotated[
        str | None, typer.Option(help="a JSONL, CSV or Parquet file in the form the run was trained on")
    ] = None,
    lm_eval: Annotated[
        Path | None,
        typer.Option(metavar="TASK.yaml", help="score a language model before and after on a task of lm_eval"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --lm-eval: so many rows of the task")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="with --lm-eval: run Python of the task file")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a run's adapter on a file of rows, or on a task of lm-evaluation-harness."""
    if (data is None) == (lm_eval is None):
        raise ConfigError("eval: give one of --data ROWS.jsonl and --lm-eval TASK.yaml")
    if lm_eval is None and (limit is not None or allow_code):
        raise ConfigError(f"eval: {'--limit' if limit is not None else '--allow-code'} goes with --lm-eval")
    from orchestrator.artifacts import open_run, score
    from orchestrator.stores.remote import localised

    opened = open_run(localised(run))
    if lm_eval is not None:
        from orchestrator.harness import as_text, score_task

        report = score_task(opened, lm_eval, limit, allow_code)
        _print(json.dumps(asdict(report)) if as_json else as_text(report))
        return
    assert data is not None
    result = score(opened, data)
    metric = "accuracy" if opened.labels else "exact match"
    if as_json:
        found = {
            "loss": result.loss,
            "accuracy": result.accuracy,
            "metric": metric,
            "examples": result.num_examples,
        }
        _print(json.dumps(found))
    else:
        _print(f"{metric} {result.accuracy:.4f}, loss {result.loss:.4f} on {result.num_examples} rows of {data}")


@app.command()
def export(
    run: RunPlace,
    to: Annotated[Path, typer.Option(help="a new or empty folder")],
    merge: Annotated[bool, typer.Option(help="fold the adapter into the weights and write the whole model")] = False,
) -> None:
    """Write the adapter as a PEFT directory, or the merged model; the logits are compared before it says done."""
    from orchestrator.artifacts import export as write
    from orchestrator.artifacts import open_run
    from orchestrator.exports import EXPORTS
    from orchestrator.stores.remote import Mirror, is_url, localised

    difference = write(open_run(localised(run)), to, merge)
    if is_url(run):
        Mirror(run).put(EXPORTS)
    kind = "merged model" if merge else "PEFT adapter"
    _print(f"{kind} written to {to}; largest difference of a logit {difference:.1e}")


@runs_app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="where runs are kept")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """All runs in a folder."""
    from orchestrator.runs import describe, find

    rows = [describe(path) for path in find(folder)]
    if as_json:
        _print(json.dumps(rows))
    elif not rows:
        _print(f"no runs in {folder}")
    else:
        _print(f"{'run':<28}{'status':<13}{'rounds':<9}{'strategy':<12} {'accuracy':<10}{'loss':<8}")
        for row in rows:
            rounds = f"{row['round']}/{row['rounds']}"
            accuracy, loss = (f"{row[key]:.4f}" if row[key] is not None else "-" for key in ("accuracy", "loss"))
            _print(f"{row['run']:<28}{row['status']:<13}{rounds:<9}{row['strategy']:<12} {accuracy:<10}{loss:<8}")


@runs_app.command("show")
def show_run(run: RunPlace, as_json: AsJson = False) -> None:
    """One run: its summary and its rounds."""
    from rich.console import Console

    from orchestrator.console import describe_learned, print_summary
    from orchestrator.runs import describe
    from orchestrator.stores.files import read_json, read_lines, shard_folders
    from orchestrator.stores.remote import localised

    folder = localised(run)
    row = describe(folder)
    metrics = read_lines(folder / "metrics.jsonl")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    shards = {number: describe(part) for number, part in shard_folders(folder).items()}
    if as_json:
        _print(json.dumps({"run": row, "summary": summary, "rounds": metrics, "shards": list(shards.values())}))
        return
    for number, shard in shards.items():
        _print(f"shard {number}: {shard['status']}, {shard['round']} of {shard['rounds']} rounds committed")
    for line in metrics:
        scores = line["eval"]
        held = (
            f"held-out loss {scores['loss']:.4f}, {100 * scores['accuracy']:.1f} % right" if scores else "not evaluated"
        )
        updates = f"{len(line['admitted'])} of {len(line['selected'])} updates"
        _print(f"round {line['round']:>3}  {describe_learned(line)}  {held}  {updates}")
    if summary.get("status") == "finished":
        print_summary(Console(highlight=False), summary, str(folder))
    else:
        _print(f"{folder}: {row['status']}, {row['round']} of {row['rounds']} rounds committed")


@strategies_app.command("list")
def list_strategies(plugins: PluginPaths = None, as_json: AsJson = False) -> None:
    """All strategies and wrappers."""
    from fedlora.plugins import load_plugins
    from orchestrator.strategies import listing, print_listing

    load_plugins(plugins or [])
    found = listing()
    if as_json:
        _print(json.dumps(found))
    else:
        print_listing(found)


@strategies_app.command("show")
def show_strategy(
    name: Annotated[str, typer.Argument(help="a strategy or wrapper, such as flexlora")],
    plugins: PluginPaths = None,
    as_json: AsJson = False,
) -> None:
    """One of them: equation, traits, traffic, options."""
    from fedlora.plugins import load_plugins
    from orchestrator.strategies import describe, print_description

    load_plugins(plugins or [])
    told = describe(name)
    if as_json:
        _print(json.dumps(told))
    else:
        print_description(told)


@strategies_app.command("check")
def check_strategies(
    file: Annotated[str, typer.Argument(help="a Python file that registers strategies or wrappers")],
    stacks: Annotated[
        list[str] | None,
        typer.Option("--strategy", metavar="YAML", help="check this instead: a name with options, or a stack"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import a file and try every strategy in it on the laws that each has to keep."""
    from orchestrator.verdicts import as_data, as_text, check_file, passed

    verdicts = check_file(file, stacks or [])
    _print(json.dumps(as_data(file, verdicts)) if as_json else as_text(file, verdicts))
    if not passed(verdicts):
        raise typer.Exit(2)


@app.command("profile")
def show_profile(
    run: Annotated[Path, typer.Argument(help="a finished run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Where the time of a run went."""
    from orchestrator.profile import profile

    found = profile(run)
    _print(json.dumps(found.to_json()) if as_json else found.to_text())


@app.command("lineage")
def show_lineage(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    client: Annotated[str | None, typer.Option(help="id of a client")] = None,
    task: Annotated[str | None, typer.Option(help="name of a task of a stream")] = None,
) -> None:
    """Everything in a run folder that descends from a client or a task."""
    from orchestrator.unlearning.lineage import lineage

    if bool(client) == bool(task):
        raise ConfigError("lineage: give --client or --task")
    for line in lineage(run, client=client, task=task):
        _print(line)


@app.command()
def version() -> None:
    """Print the version."""
    _print(__version__)


def main() -> None:
    """Entry point: turns errors of ours into a sentence and an exit code."""
    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        sys.exit(error.exit_code)
    except FedLoRAError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _play(work: Any, folder: str, as_json: bool) -> None:
    from orchestrator.console import JsonScreen, Screen, print_summary

    screen: JsonScreen | Screen = JsonScreen() if as_json else Screen()
    with screen:
        summary = work(screen)
    if isinstance(screen, Screen):
        print_summary(screen.console, summary, folder)
    else:
        _print(json.dumps({"event": "summary", **summary}))


def _print(text: str) -> None:
    typer.echo(text)
