"""Comparisons: a table of runs that can be cut short anywhere, and mistakes that cost nothing."""

import fcntl
import json
import multiprocessing
import os
import signal
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, RunInterrupted
from orchestrator import cli
from orchestrator.axes import axes, grid, labels, slug, split
from orchestrator.compare import Request, plan, run
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

COMMAND = "fedlora compare ..."
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["orchestrator.launch", "clients.runtime", "tests.conftest"])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of a second; its own output_dir is never used."""
    folder = tmp_path_factory.mktemp("config")
    settings = toy_config(folder / "run", rounds=2, training__max_steps=1, clients__per_round=3)
    (folder / "toy.yaml").write_text(settings.to_yaml())
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``fedit`` and the personal ``fedsa`` on two seeds."""
    return compare(config, tmp_path_factory.mktemp("two"), strategies="fedit,fedsa", seeds=2)


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs ``fedlora`` with arguments; gives exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(stopped.value.code or 0), captured.out, captured.err

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def compare(config: Path, folder: Path, listen: Any = quiet, **request: Any) -> dict[str, Any]:
    *_, last = run(plan(Request(config, to=folder, **request)), listen, COMMAND)
    return last


def started(folder: Path) -> dict[str, int]:
    """How often every run below ``folder`` was begun or gone on with."""
    journals = {str(path.parent.relative_to(folder)): read_lines(path) for path in folder.glob("*/*/journal.jsonl")}
    return {
        name: sum(line["event"] in ("run_opened", "run_resumed") for line in lines) for name, lines in journals.items()
    }


def test_a_row_has_the_mean_and_the_spread_of_its_seeds(two: dict[str, Any]) -> None:
    for row in two["rows"]:
        runs = [Path(two["folder"]) / row["strategy"] / f"seed-{seed}" for seed in (0, 1)]
        summaries = [read_json(run / "summary.json") for run in runs]
        scores = [summary["final"]["accuracy"] for summary in summaries]
        assert row["accuracy"]["mean"] == pytest.approx(sum(scores) / 2)
        assert row["accuracy"]["sd"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)  # of two numbers
        assert row["bytes_up"]["mean"] == statistics.fmean(summary["bytes_up"] for summary in summaries)
        assert row["server_s"]["each"] == [summary["seconds"]["aggregate"] for summary in summaries]
        worst = [read_lines(run / "metrics.jsonl")[-1]["clients"]["accuracy"]["worst"] for run in runs]
        assert row["worst_client"]["each"] == worst
        assert [at["round"] for at in row["curves"][0]] == [0, 1, 2]
        assert row["curves"][0][-1]["bytes_up"] == summaries[0]["bytes_up"]


def test_a_repeated_command_shows_the_same_table_and_runs_nothing(fedlora: Any, config: Path, two: dict) -> None:
    folder = Path(two["folder"])
    arguments = ("compare", config, "--strategies", "fedit,fedsa", "--seeds", 2, "--to", folder)
    code, out, _ = fedlora(*arguments)
    assert code == 0
    assert "4 runs, 4 of them finished before" in out
    assert set(started(folder).values()) == {1}
    assert read_json(folder / "compare.json")["rows"] == two["rows"]
    page = (folder / "compare.md").read_text()
    assert " ".join(map(str, ("fedlora", *arguments))) in page
    accuracy = two["rows"][0]["accuracy"]
    assert f"| fedit | {accuracy['mean']:.3f} ± {accuracy['sd']:.3f} |" in page
    assert "2 seeds, 0 to 1" in page
    for text in (out, page.replace("\\*", "*")):
        assert "fedsa*" in text
        assert "* Clients keep a part of the adapter" in text
    drawn = "".join(ET.parse(folder / "compare.svg").getroot().itertext())
    assert "fedit" in drawn
    assert "fedsa*" in drawn


def test_more_seeds_and_strategies_run_only_what_is_new(config: Path, two: dict) -> None:
    before = started(Path(two["folder"]))
    more = compare(config, Path(two["folder"]), strategies="fedsa,fedit,zero_pad", seeds=1)
    assert [row["strategy"] for row in more["rows"]] == ["fedsa", "fedit", "zero_pad"]
    assert started(Path(two["folder"])) == before | {"zero_pad/seed-0": 1}
    assert more["rows"][0]["accuracy"]["sd"] is None


def _compare_until_killed(config: Path, folder: Path) -> None:
    os.environ["FEDLORA_FAILPOINT"] = "round.trained:2"
    compare(config, folder, strategies="fedsa")


@pytest.mark.slow
def test_kill_9_in_the_middle_then_the_same_command_gives_the_same_numbers(
    config: Path, two: dict, tmp_path: Path
) -> None:
    process = CLEAN.Process(target=_compare_until_killed, args=(config, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert started(tmp_path) == {"fedsa/seed-0": 1}
    assert len(read_lines(tmp_path / "fedsa/seed-0/metrics.jsonl")) == 1
    again = compare(config, tmp_path, strategies="fedsa")
    assert started(tmp_path) == {"fedsa/seed-0": 2}
    (row,), (_, undisturbed) = again["rows"], two["rows"]
    for key in ("accuracy", "loss", "bytes_up", "worst_client"):
        assert row[key]["each"] == undisturbed[key]["each"][:1]
    assert row["curves"] == undisturbed["curves"][:1]


def test_ctrl_c_says_how_to_go_on_and_keeps_the_round(config: Path, tmp_path: Path) -> None:
    def stop(event: str, fields: Any) -> None:
        if event == "round_committed":
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted, match=r"0 finished runs are in .* the same command: fedlora compare \.\.\."):
        compare(config, tmp_path, stop, strategies="fedit")
    assert len(read_lines(tmp_path / "fedit/seed-0/metrics.jsonl")) == 1
    assert compare(config, tmp_path, strategies="fedit")["rows"][0]["finished"] == 1
    assert started(tmp_path) == {"fedit/seed-0": 2}


def test_a_failed_run_costs_its_cell_only_and_says_why(fedlora: Any, config: Path, tmp_path: Path) -> None:
    arguments = ("compare", config, "--set", "rounds=3", "--to", tmp_path, "--vary")
    code, out, _ = fedlora(*arguments, "training.learning_rate=1.0e+30,0.01")
    assert code == 0
    diverged, learned = read_json(tmp_path / "compare.json")["rows"]
    assert (diverged["finished"], learned["finished"]) == (0, 1)
    assert diverged["accuracy"] is None
    line = next(line for line in out.splitlines() if line.startswith("flexlora  1.0e+30 "))
    assert " failed " in line
    assert "0 of 1" in line
    assert out.splitlines()[-2].startswith(
        "Failed: flexlora, training.learning_rate=1.0e+30, seed 0: 3 rounds in a row"
    )
    code, out, _ = fedlora(*arguments, "training.learning_rate=1.0e+30")
    assert code == 1


def test_a_bug_in_one_run_leaves_the_others_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import launch

    whole = launch.run

    def broken(settings: Any, listen: Any) -> Any:
        return 1 / 0 if settings.seed == 0 else whole(settings, listen)

    monkeypatch.setattr(launch, "run", broken)
    found = compare(config, tmp_path, strategies="fedit", seeds=2)
    assert found["rows"][0]["finished"] == 1
    assert found["rows"][0]["failed"] == {"fedit, seed 0": "ZeroDivisionError: division by zero"}
    assert "in broken" in found["cells"][0]["traceback"]


@pytest.mark.slow
def test_tuning_gives_all_seeds_to_the_value_that_did_best_on_the_first(config: Path, tmp_path: Path) -> None:
    learn = "training.learning_rate=1.0e+30,0.001,0.05"
    found = compare(config, tmp_path, strategies="flexlora", seeds=2, tune=[learn], vary=["rounds=3"])
    (row,) = found["rows"]
    failed, *tried = found["cells"][:3]
    assert failed["status"] == "failed"
    best = max(tried, key=lambda cell: (cell["accuracy"], -cell["loss"]))
    value = row["tuned"]["training.learning_rate"]
    assert best["run"] == f"flexlora, rounds=3, training.learning_rate={value}, seed 0"
    assert row["values"] == {"rounds": 3}
    assert row["finished"] == 2
    assert found["cells"][3]["run"] == best["run"].replace("seed 0", "seed 1")
    assert sorted(started(tmp_path).values()) == [1, 1, 1, 1]


MORTAL = """
import os, pathlib, signal
from fedlora.aggregation import STRATEGIES
from fedlora.aggregation.product import FlexLoRA

@STRATEGIES.register("mortal")
class Mortal(FlexLoRA):
    name = "mortal"

    def aggregate(self, updates, ctx, state):
        if ctx.round == 2 and not pathlib.Path(__file__).with_name("cured").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().aggregate(updates, ctx, state)
"""


@pytest.mark.slow
def test_of_two_jobs_one_that_dies_costs_its_cell_until_the_command_is_repeated(
    fedlora: Any, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL)
    settings = ("--set", f"plugins=[{tmp_path / 'mortal.py'}]", "--set", "threads=null")
    arguments = ("compare", config, "--strategies", "mortal,fedit", *settings, "--to", tmp_path / "out")
    code, out, _ = fedlora(*arguments, "--jobs", 2)
    assert code == 0
    assert "mortal, seed 0: failed: its process was killed by signal 9" in out
    assert [row["finished"] for row in read_json(tmp_path / "out" / "compare.json")["rows"]] == [0, 1]
    assert len(read_lines(tmp_path / "out" / "mortal" / "seed-0" / "metrics.jsonl")) == 1
    (tmp_path / "cured").touch()
    assert fedlora(*arguments)[0] == 0  # one job has all cores, but the run keeps the threads it began with
    assert [row["finished"] for row in read_json(tmp_path / "out" / "compare.json")["rows"]] == [1, 1]
    assert started(tmp_path / "out") == {"fedit/seed-0": 1, "mortal/seed-0": 2}


def test_json_prints_events_and_at_the_end_the_comparison(fedlora: Any, config: Path, two: dict) -> None:
    code, out, _ = fedlora(
        *("compare", config, "--strategies", "fedit,fedsa", "--seeds", 2, "--to", two["folder"], "--json")
    )
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["comparison_started", "comparison"]
    assert events[-1]["rows"] == two["rows"]


BAD: dict[str, tuple[list[str], int, str]] = {
    "strategy": (["--strategies", "fedit,flexlor"], 2, "did you mean flexlora?"),
    "option of a strategy": (["--strategies", "[{clip: {max: 1}}, fedit]"], 2, "does not take these options"),
    "open bracket": (["--strategies", "fedit,[clip"], 2, "a bracket or quote is not closed"),
    "empty name": (["--strategies", "fedit,,ffa"], 2, "nothing beside one of the commas"),
    "the same strategy twice": (["--strategies", "ffa,fedit,ffa"], 2, "ffa is in the comparison twice"),
    "key": (["--vary", "training.learning_rat=1,2"], 2, "did you mean training.learning_rate?"),
    "value": (["--vary", "rounds=2,many"], 2, "rounds is 'many'"),
    "value of a tuned key": (["--tune", "rounds=2,many"], 2, "rounds is 'many'"),
    "no values": (["--vary", "rounds"], 2, "expected KEY=VALUE,VALUE"),
    "key in both": (["--vary", "rounds=1,2", "--tune", "rounds=3,4"], 2, "in --vary and in --tune"),
    "key twice": (["--vary", "rounds=1", "--vary", "rounds=2"], 2, "list all of its values in one"),
    "the seed as a key": (["--vary", "seed=1,2"], 2, "seed comes from --seeds"),
    "rank above the layer": (["--vary", "lora.r=8,64"], 4, "larger than the layer"),
    "data": (["--set", "data.train_file=gone.jsonl"], 3, "no file gone.jsonl"),
    "jobs on Ray": (["--set", "pool=ray", "--jobs", "2"], 2, "--jobs is for pool: local"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_before_anything_runs(fedlora: Any, config: Path, tmp_path: Path, name: str) -> None:
    flags, expected, message = BAD[name]
    code, _, err = fedlora("compare", config, *flags, "--to", tmp_path / "new")
    assert code == expected, err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_runs_of_another_configuration_are_not_mixed_in(fedlora: Any, config: Path, two: dict) -> None:
    code, _, err = fedlora("compare", config, "--strategies", "fedit", "--set", "rounds=5", "--to", two["folder"])
    assert code == 5
    assert "different: rounds" in err
    assert "--to" in err


def test_two_comparisons_do_not_work_in_one_folder(fedlora: Any, config: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = fedlora("compare", config, "--strategies", "fedit", "--to", tmp_path)
    assert code == 5
    assert "another comparison works in" in err
    assert started(tmp_path) == {}


def test_the_folder_is_named_after_the_configuration_and_its_overrides(tmp_path: Path) -> None:
    content = "model: {name: builtin:tiny-bert}\ndata: {name: builtin:toy, max_length: 32}\nstrategy: fedit\n"
    (tmp_path / "mine.yaml").write_text(content)
    assert plan(Request(tmp_path / "mine.yaml")).folder == Path("runs/compare-mine")
    named = plan(Request(tmp_path / "mine.yaml", overrides=["rounds=2"])).folder.name
    assert named.startswith("compare-mine-")


def test_texts_are_split_at_the_commas_outside_brackets_and_quotes() -> None:
    text = "fedit, [{clip: {max_norm: 1, b: [2, 3]}}, flexlora],'a,b',{florist: {tau: 0.9}}"
    expected = ["fedit", "[{clip: {max_norm: 1, b: [2, 3]}}, flexlora]", "'a,b'", "{florist: {tau: 0.9}}"]
    assert split(text, "--strategies") == expected


def test_values_are_yaml_and_the_grid_has_every_combination() -> None:
    found = axes(["clients.ranks=4,[4, 8]", "training.base_dropout=true,false"], "--vary")
    assert found == {"clients.ranks": [4, [4, 8]], "training.base_dropout": [True, False]}
    assert len(grid(found)) == 4
    assert grid({}) == [{}]
    with pytest.raises(ConfigError, match="is not valid YAML"):
        axes(["data.name=a: b: c"], "--vary")


def test_options_are_in_the_label_where_names_are_shared() -> None:
    stacks: list[Any] = [[{"clip": {"max_norm": 1.0}}, "flexlora"], ["clip", "flexlora"], {"florist": {"tau": 0.9}}]
    assert labels(stacks) == ["clip(flexlora), max_norm=1.0", "clip(flexlora)", "florist"]


def test_folders_are_readable_and_differ_where_the_strategies_do() -> None:
    assert slug("flexlora", {"training.learning_rate": 0.004}) == "flexlora-training.learning_rate=0.004"
    stacks = [[{"clip": {"max_norm": norm}}, "flexlora"] for norm in (1.0, 10.0, "median")]
    assert len({slug(stack, {}) for stack in stacks}) == 3
    assert all("/" not in slug({"florist": {"path": "a/../b" * 30}}, {}) for _ in stacks)
