"""Requests carried out, from the command to the certificate."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.continual.stream import open_stream
from fedlora.errors import LeaseHeld, RunInterrupted, UnlearningError
from fedlora.unlearning.keys import authorised, load_key, new_key
from fedlora.unlearning.request import Request, hashed, sign_request
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.cli import app
from orchestrator.stores.files import read_config, read_json, read_lines
from orchestrator.unlearning.certificate import verify_certificate
from orchestrator.unlearning.execute import carry_out, withdraw
from orchestrator.unlearning.requests import find_request, identity, read_requests, receive
from orchestrator.unlearning.rollback import plan_rollback
from tests.conftest import quiet
from tests.unlearning.test_rollback import adapter_of, asked, config_of


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys" / "officer")
    return tmp_path / "keys"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    launch.run(config_of(tmp_path / "run"), quiet)
    return tmp_path / "run"


def request(folder: Path, keys: Path, client: str, **changes: Any) -> str:
    """A request for a client, noted and not carried out."""
    key = load_key(keys / "officer")
    wanted = Request("client", (client,), "rollback", **changes)
    return receive(folder, sign_request(wanted, identity(folder), key), authorised([keys])).id


def finish(folder: Path, keys: Path, name: str, listen: Callable[[str, Any], None] = quiet) -> None:
    with launch.hold_run(read_config(folder), folder) as lease:
        carry_out(folder, name, lease, load_key(keys / "officer"), listen)


def control(config: Any, folder: Path, *clients: str) -> bytes:
    changes = {**config.clients.model_dump(), "exclude": list(clients)}
    launch.run(config_of(folder, clients=changes), quiet)
    return adapter_of(folder)


def test_a_client_is_taken_out_and_every_trace_of_it_goes(run: Path, keys: Path, tmp_path: Path) -> None:
    target = asked(run)[1][0]
    config, before = read_config(run), adapter_of(run)
    name = request(run, keys, target)
    finish(run, keys, name)
    standing = find_request(run, name)
    assert (standing.phase, standing.level) == ("certified", "E1")
    assert adapter_of(run) == control(config, tmp_path / "control", target) != before
    assert not any(target in row for row in asked(run))
    assert target not in [row["client"] for row in read_json(run / "partition.json")]
    assert verify_certificate(run, name, authorised([keys])) == []
    assert not (run / "unlearning" / name).exists()
    last = read_lines(run / "journal.jsonl")[-1]
    assert (last["event"], last["request"], last["clients"]) == ("unlearned", name, [target])
    # the run is a finished one, and stays so
    events: list[str] = []
    launch.resume(run, lambda event, fields: events.append(event))
    assert events == ["already_finished"]
    (run / "adapter" / "adapter_model.safetensors").write_bytes(before)
    assert any("adapter_model" in problem for problem in verify_certificate(run, name, authorised([keys])))


@pytest.mark.parametrize("now", [pytest.param(False, marks=pytest.mark.slow), True])
def test_containment_puts_an_adapter_without_the_client_in_use_first(
    run: Path, keys: Path, tmp_path: Path, now: bool
) -> None:
    target = next(c for row in reversed(asked(run)) for c in row if c not in asked(run)[0])
    before, seen = adapter_of(run), {}

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        if event == "unlearning" and fields["phase"] == "contained":
            seen["adapter"] = adapter_of(run)

    name = request(run, keys, target, now=now)
    finish(run, keys, name, listen)
    assert (seen["adapter"] == before) is not now
    assert find_request(run, name).level == "E1"


PLACES = [
    *(f"request.{phase}:1" for phase in ("planned", "contained", "executed", "verified", "purged")),
    *("round.aggregated:3", "publish.removed.checkpoints:0", "publish.moved.checkpoints:0"),
    *("journal.taken:3", "journal.told:0"),
    *("publish.moved.config.yaml:0", "publish.done:0", "certificate.written:1", "certificate.shown:1"),
]
FAST = ("publish.moved.checkpoints:0",)


def _killed(folder: str, keys: str, name: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    finish(Path(folder), Path(keys), name)


@pytest.mark.parametrize(
    "place", [place if place in FAST else pytest.param(place, marks=pytest.mark.slow) for place in PLACES]
)
def test_kill_9_in_any_phase_then_the_same_command_ends_the_same(
    run: Path, keys: Path, tmp_path: Path, place: str
) -> None:
    target = asked(run)[1][0]
    config = read_config(run)
    name = request(run, keys, target, now=True)
    process = get_context("spawn").Process(target=_killed, args=(str(run), str(keys), name, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert request(run, keys, target, now=True) == name
    finish(run, keys, name)
    assert adapter_of(run) == control(config, tmp_path / "control", target)
    assert verify_certificate(run, name, authorised([keys])) == []
    assert list(read_requests(run)) == [name]
    journal = [line for line in read_lines(run / "journal.jsonl") if line.get("request") == name]
    assert [line["round"] for line in journal if line["event"] == "round_committed"] == [2, 3, 4]
    assert [line["event"] for line in journal].count("unlearned") == 1
    assert sorted(path.name for path in (run / "unlearning").iterdir()) == [
        *(".lock", f"{name}.html", f"{name}.json", "requests.jsonl")
    ]


@pytest.mark.slow
def test_one_request_after_the_other_and_an_earlier_one_comes_first(run: Path, keys: Path, tmp_path: Path) -> None:
    config = read_config(run)
    first, second = request(run, keys, "c0"), request(run, keys, "c2")
    with pytest.raises(UnlearningError, match="R2 waits for R1, which asks to take out client c0 and is received"):
        finish(run, keys, second)
    threads = [threading.Thread(target=_until_done, args=(run, keys, name)) for name in (second, first)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {standing.phase for standing in read_requests(run).values()} == {"certified"}
    assert adapter_of(run) == control(config, tmp_path / "control", "c0", "c2")
    assert [verify_certificate(run, name, authorised([keys])) for name in (first, second)] == [[], []]


def _until_done(run: Path, keys: Path, name: str) -> None:
    while find_request(run, name).is_open:
        with contextlib.suppress(LeaseHeld, UnlearningError):  # held by the other, or not its turn yet
            finish(run, keys, name)


def test_a_run_that_is_being_played_stops_at_its_next_round_and_goes_on_without(keys: Path, tmp_path: Path) -> None:
    config, folder = config_of(tmp_path / "run"), tmp_path / "run"

    def ask(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_started" and fields["round"] == 3:
            request(folder, keys, asked(folder)[0][0])

    with pytest.raises(RunInterrupted, match="stopped after round 3: R1 asks to take out client .* and is received"):
        launch.run(config, ask)
    target = find_request(folder, "R1").request.target[0]
    with pytest.raises(RunInterrupted, match="R1 asks"):
        launch.resume(folder, quiet)
    finish(folder, keys, "R1")
    state, _ = load_latest(folder)
    assert state is not None
    assert state.round == 0
    launch.resume(folder, quiet)
    assert adapter_of(folder) == control(config, tmp_path / "control", target)


def test_the_commands_do_the_same(run: Path, keys: Path) -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["unlearn", *words])

    place, target = str(run), asked(run)[1][0]
    planned = call("plan", place, "--client", target, "--json")
    assert json.loads(planned.stdout)["actions"][0]["level"] == "E1"
    words = ("--client", target, "--key", str(keys / "officer"), "--authorised", str(keys), "--json")
    done = call("run", place, *words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["level"] == "E1"
    assert json.loads(call("list", place, "--json").stdout)["phase"] == "certified"
    assert json.loads(call("certificate", place, "--request", "R1").stdout)["statement"]["level"]
    assert call("verify", place, "--request", "R1", "--authorised", str(keys)).exit_code == 0
    again = call("run", place, *words)
    assert json.loads(again.stdout)["request"] == "R1"
    other = call("run", place, *words, "--now")
    assert "already erased by R1" in str(other.exception)


def test_records_go_by_their_names_and_only_hashes_stay(run: Path, keys: Path, tmp_path: Path) -> None:
    config = read_config(run)
    corpus = open_stream(config.data, None, 6, config.seed).corpus
    text = corpus.train[corpus.shards["c0"][0]]["text"]
    (tmp_path / "names.txt").write_text(text + "\n")
    words = ["--records", str(tmp_path / "names.txt"), "--key", str(keys / "officer"), "--authorised", str(keys)]
    result = CliRunner().invoke(app, ["unlearn", "run", str(run), *words])
    assert result.exit_code == 0, result.output
    assert read_config(run).data.forget == list(hashed([text]))
    assert verify_certificate(run, "R1", authorised([keys])) == []
    kept = [path for path in (run / "unlearning").iterdir() if text.encode() in path.read_bytes()]
    assert not kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--client", "c77"], "R1 is refused: unknown client c77"),
        ([f"--client=c{i}" for i in range(6)], "it would leave no clients"),
        (
            ["--client", "c0", "--action", "melt"],
            "unlearning action: melt is not known",
        ),
        ([], "name what to take out, one kind of --client c7, --records names.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(run: Path, keys: Path, words: list[str], message: str) -> None:
    before = adapter_of(run)
    common = ["--key", str(keys / "officer"), "--authorised", str(keys)]
    result = CliRunner().invoke(app, ["unlearn", "run", str(run), *words, *common])
    assert message in str(result.exception)
    assert adapter_of(run) == before


def test_a_key_that_nobody_authorised_takes_nothing_out(run: Path, keys: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "other" / "stranger")
    common = ["--key", str(tmp_path / "other" / "stranger"), "--authorised", str(keys)]
    result = CliRunner().invoke(app, ["unlearn", "run", str(run), "--client", "c0", *common])
    assert "is not authorised" in str(result.exception)
    assert len(asked(run)) == 4


# What a sceptical reader found --------------------------------------------------------------------------------------


def _run_killed(folder: str, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(config_of(Path(folder)), quiet)


@pytest.mark.slow
def test_a_client_whose_round_was_committed_and_not_logged_is_known_all_the_same(keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = get_context("spawn").Process(target=_run_killed, args=(str(folder), "commit.renamed:3"))
    process.start()
    process.join()
    state, _ = load_latest(folder)
    assert state is not None
    assert state.row is not None
    before = {client for row in asked(folder) for client in row}
    target = next(client for client in state.row["selected"] if client not in before)
    plan = plan_rollback(folder, [target])
    assert (plan.first, plan.start) == (3, 2)
    config = read_config(folder)
    finish(folder, keys, request(folder, keys, target))
    launch.resume(folder, quiet)
    assert adapter_of(folder) == control(config, tmp_path / "control", target)


@pytest.mark.slow
def test_a_resume_in_the_middle_of_a_publication_writes_nothing(run: Path, keys: Path, tmp_path: Path) -> None:
    target, config = asked(run)[1][0], read_config(run)
    name = request(run, keys, target)
    args = (str(run), str(keys), name, "publish.removed.checkpoints:0")
    process = get_context("spawn").Process(target=_killed, args=args)
    process.start()
    process.join()
    assert not (run / "checkpoints").exists()
    with pytest.raises(RunInterrupted, match="R1 asks to take out"):
        launch.resume(run, quiet)
    assert not (run / "checkpoints").exists()
    finish(run, keys, name)
    assert adapter_of(run) == control(config, tmp_path / "control", target)


def test_what_a_run_cannot_do_without_is_refused_and_leaves_everything_as_it_was(keys: Path, tmp_path: Path) -> None:
    trusting = config_of(tmp_path / "run", strategy=[{"fltrust": {"root": "c0"}}, "flexlora"])
    launch.run(trusting, quiet)
    folder, before = tmp_path / "run", adapter_of(tmp_path / "run")
    with pytest.raises(UnlearningError, match="cannot do without c0, which it trusts"):
        finish(folder, keys, request(folder, keys, "c0", now=True))
    assert adapter_of(folder) == before
    assert not find_request(folder, "R1").is_open


@pytest.mark.slow
def test_a_quorum_is_of_those_who_can_still_be_asked(keys: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", schedule={"quorum": 1.0}, clients={"count": 6, "ranks": [2, 4, 8]})
    launch.run(config, quiet)
    finish(tmp_path / "run", keys, request(tmp_path / "run", keys, "c2"))
    assert all(len(row) == 5 for row in asked(tmp_path / "run"))


def test_what_was_replayed_on_another_machine_is_known_to_later_requests(
    run: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = launch.facts
    with monkeypatch.context() as there:
        there.setattr(launch, "facts", lambda *args: {**here(*args), "cpu": "another"})
        finish(run, keys, request(run, keys, asked(run)[1][0]))
    plan = plan_rollback(run, ["c1"])
    assert (plan.level, plan.doubts) == ("E2", ("a session was played with another cpu",))


def test_isolated_tasks_get_all_their_adapters_back_when_a_request_is_taken_back(keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch.run(config_of(folder, continual={"split": 2, "rounds": 1, "isolated": True}, rounds=2), quiet)

    def adapters() -> dict[str, bytes]:
        files = sorted((folder / "adapter").rglob("*.safetensors"))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "unlearning" and fields["phase"] == "contained":
            raise KeyboardInterrupt

    before = adapters()
    name = request(folder, keys, asked(folder)[1][0], now=True)
    with pytest.raises(KeyboardInterrupt):
        finish(folder, keys, name, stop)
    assert adapters() != before
    with launch.hold_run(read_config(folder), folder):
        withdraw(folder, name, "asked by mistake")
    assert adapters() == before
    assert len(before) == 3


def test_a_request_can_be_taken_back_until_it_is_carried_out(run: Path, keys: Path) -> None:
    before = adapter_of(run)
    name = request(run, keys, asked(run)[2][0], now=True)

    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_committed":
            raise KeyboardInterrupt

    with pytest.raises(RunInterrupted):
        finish(run, keys, name, stop)
    words = ["--request", name, "--key", str(keys / "officer"), "--authorised", str(keys)]
    result = CliRunner().invoke(app, ["unlearn", "withdraw", str(run), *words])
    assert result.exit_code == 0, result.output
    assert adapter_of(run) == before
    assert "withdrawn by key" in (find_request(run, name).reason or "")
    assert len(asked(run)) == 4
