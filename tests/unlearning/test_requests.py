"""The request log: who asked for what, how far it has come, and that nobody can change that unseen."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError, RunFolderError, UnlearningError
from fedlora.unlearning.keys import Keys, authorised, fingerprint, load_key, load_public, new_key
from fedlora.unlearning.request import Request, hashed, sign_request
from fedlora.unlearning.standing import Standing
from orchestrator.unlearning.requests import (
    LOG,
    advance,
    check_log,
    find_request,
    identity,
    pending,
    read_requests,
    receive,
    refuse,
)

FORK = multiprocessing.get_context("fork")  # the children only write a line
STEPS = [("planned", {"cost": 0.5}), ("executed", {"level": "E1"}), ("verified", {}), ("purged", {}), ("certified", {})]


def ask(folder: Path, key: Ed25519PrivateKey, keys: Keys, kind: str, *target: str, now: bool = False) -> Standing:
    return receive(folder, sign_request(Request(kind, target, now=now), identity(folder), key), keys)


def carry_out(folder: Path, request: str, level: str = "E1") -> None:
    for phase, facts in STEPS:
        advance(folder, request, phase, facts if phase != "executed" else {"level": level})


# What is noted -----------------------------------------------------------------------------------------------------


def test_a_request_goes_through_its_phases_and_the_log_remembers_each(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    first = ask(run, officer, keys, "client", "c1")
    assert (first.id, first.phase, first.signed.signer) == ("R1", "received", *keys)
    assert [standing.id for standing in pending(run)] == ["R1"]
    carry_out(run, "R1")
    done = find_request(run, "R1")
    assert list(done.times) == ["received", "planned", "executed", "verified", "purged", "certified"]
    assert done.facts["planned"] == {"cost": 0.5}
    assert done.erased
    assert pending(run) == []
    assert check_log(run) == []


def test_a_request_that_is_refused_after_it_was_carried_out_has_reached_no_level(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    ask(run, officer, keys, "client", "c1")
    for phase, facts in STEPS[:2]:
        advance(run, "R1", phase, facts)
    assert find_request(run, "R1").level == "E1"
    refused = refuse(run, "R1", "verification: the gate rejects it")
    assert (refused.phase, refused.level, refused.erased) == ("refused", None, False)


def test_the_same_request_again_is_the_same_entry(run: Path, officer: Ed25519PrivateKey, keys: Keys) -> None:
    assert ask(run, officer, keys, "client", "c1", "c2").id == "R1"
    before = (run / LOG).read_bytes()
    assert ask(run, officer, keys, "client", "c2", "c1", "c1").id == "R1"
    advance(run, "R1", "planned", {"cost": 0.5})
    assert ask(run, officer, keys, "client", "c1", "c2").phase == "planned"
    advance(run, "R1", "planned", {"cost": 0.5})
    assert (run / LOG).read_bytes().count(b"\n") == before.count(b"\n") + 1


def test_phases_come_in_their_order_and_only_containment_may_be_left_out(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    ask(run, officer, keys, "client", "c1", now=True)
    with pytest.raises(UnlearningError, match="R1 is received; next is planned, not executed"):
        advance(run, "R1", "executed", {"level": "E1"})
    advance(run, "R1", "planned")
    with pytest.raises(UnlearningError, match="next is contained or executed, not purged"):
        advance(run, "R1", "purged")
    advance(run, "R1", "contained")
    with pytest.raises(UnlearningError, match="notes its level, one of E1, E2, C, A, S"):
        advance(run, "R1", "executed", {"level": "perfect"})
    with pytest.raises(UnlearningError, match="there is no request R2"):
        advance(run, "R2", "planned")
    with pytest.raises(UnlearningError, match="cannot be hashed or signed"):
        advance(run, "R1", "executed", {"level": "E1", "auc": float("nan")})
    refuse(run, "R1", "the gate failed")
    with pytest.raises(UnlearningError, match="R1 is refused; nothing can follow, ask again"):
        advance(run, "R1", "executed", {"level": "E1"})
    assert ask(run, officer, keys, "client", "c1", now=True).id == "R2"


def test_records_are_logged_by_hash_and_plain_ids_are_never_taken(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    with pytest.raises(UnlearningError, match="never by the ids"):
        Request("records", ("anna.schmidt",))
    ask(run, officer, keys, "records", *hashed(["anna.schmidt", "row 7"]))
    assert "anna" not in (run / LOG).read_text()
    with pytest.raises(UnlearningError, match="one of client, task"):
        Request("person", ("c1",))
    with pytest.raises(UnlearningError, match="this one names none"):
        Request("client", ())


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        ("client", ["c11"], "unknown client c11; did you mean c1?"),
        ("task", ["tasks1"], "unknown task tasks1; did you mean task1?"),
        ("class", ["colors"], "unknown label colors; did you mean colours?"),
        ("client", ["c0", "c1", "c2", "c3"], "it would leave no clients; to give up everything, delete the run"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    run: Path, officer: Ed25519PrivateKey, keys: Keys, kind: str, target: list[str], reason: str
) -> None:
    refused = ask(run, officer, keys, kind, *target)
    assert (refused.phase, refused.reason) == ("refused", reason)
    assert ask(run, officer, keys, kind, *target).id == refused.id
    assert (run / LOG).read_bytes().count(b"\n") == 1


def test_what_is_erased_is_not_erased_again_and_what_was_only_approximated_may_be(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    ask(run, officer, keys, "client", "c1", "c2")
    waiting = ask(run, officer, keys, "client", "c2")
    assert waiting.reason == "R1 asks for client c1, c2 already and is received; let it end first"
    carry_out(run, "R1", level="A")
    assert ask(run, officer, keys, "client", "c2").phase == "received"
    carry_out(run, "R3", level="E2")
    assert ask(run, officer, keys, "client", "c2", now=True).reason == "client c2 was already erased by R3 (level E2)"


def test_requests_that_together_would_leave_nobody_are_refused(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    assert ask(run, officer, keys, "client", "c0", "c1").phase == "received"
    assert "no clients" in (ask(run, officer, keys, "client", "c2", "c3").reason or "")
    assert ask(run, officer, keys, "client", "c2").phase == "received"


def test_only_authorised_keys_may_ask(run: Path, officer: Ed25519PrivateKey, keys: Keys) -> None:
    stranger = Ed25519PrivateKey.generate()
    refused = ask(run, stranger, keys, "client", "c1")
    assert refused.reason == f"the key {fingerprint(stranger.public_key())[:16]} is not authorised (1 are)" + (
        "; ask who keeps the authorised keys"
    )
    # a stranger who was first does not stand in the way
    assert (ask(run, officer, keys, "client", "c1").id, read_requests(run)["R2"].phase) == ("R2", "received")
    assert ask(run, stranger, keys, "client", "c1").id == "R1"


def test_a_forged_signature_and_one_for_another_run_are_not_even_noted(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    signed = sign_request(Request("client", ("c1",)), identity(run), officer)
    other = type(signed)(Request("client", ("c2",)), signed.run, signed.public_key, signed.signature)
    with pytest.raises(UnlearningError, match="the signature is not that of key"):
        receive(run, other, keys)
    elsewhere = sign_request(Request("client", ("c1",)), "0" * 64, officer)
    with pytest.raises(UnlearningError, match="signed for the run 000000000000"):
        receive(run, elsewhere, keys)
    assert read_requests(run) == {}


# Damage, crashes, and two at once ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_found_and_its_line_named(
    run: Path, officer: Ed25519PrivateKey, keys: Keys, data: st.DataObject
) -> None:
    if not (run / LOG).exists():
        ask(run, officer, keys, "client", "c1")
        carry_out(run, "R1")
        (run / "whole").write_bytes((run / LOG).read_bytes())
    whole = (run / "whole").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    (run / LOG).write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    line = whole[:place].count(b"\n") + 1
    assert any(f"line {line} " in problem for problem in check_log(run))
    with pytest.raises(RunFolderError, match=r"requests\.jsonl: line \d"):
        pending(run)


def test_lines_that_were_removed_moved_or_written_anew_are_found(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    ask(run, officer, keys, "client", "c1")
    carry_out(run, "R1")
    lines = (run / LOG).read_bytes().splitlines(keepends=True)
    (run / LOG).write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert check_log(run) == [f"{LOG}: line 3 does not follow line 2: a line was removed, added, moved or replaced"]
    (run / LOG).write_bytes(b"".join(lines[1:]))
    assert "line 1 does not follow this run" in check_log(run)[0]
    journal = run / "journal.jsonl"
    (run / LOG).write_bytes(b"".join(lines))
    journal.write_text(journal.read_text().replace('"round": 0', '"round": 1'))
    assert "line 1 does not follow this run" in check_log(run)[0]


def test_a_torn_last_line_counts_as_not_written_and_is_cut_off_by_the_next(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    ask(run, officer, keys, "client", "c1")
    advance(run, "R1", "planned", {"cost": 0.5})
    whole = (run / LOG).read_bytes()
    begins = whole.index(b"\n") + 1
    for cut in (begins + 1, begins + 30, len(whole) - 2):
        (run / LOG).write_bytes(whole[:cut])
        assert find_request(run, "R1").phase == "received"
        assert check_log(run) == []
        advance(run, "R1", "planned", {"cost": 0.5})
        assert find_request(run, "R1").phase == "planned"
        assert (run / LOG).read_bytes().count(b"\n") == 2
    (run / LOG).write_bytes(whole[:-1])  # all of the line but its end
    assert find_request(run, "R1").phase == "planned"
    advance(run, "R1", "executed", {"level": "E1"})
    assert [json.loads(line)["phase"] for line in (run / LOG).read_bytes().splitlines()][1:] == ["planned", "executed"]
    assert check_log(run) == []


def _carry_out_until_killed(folder: Path, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    carry_out(folder, "R1")


@pytest.mark.parametrize("phase", ["planned", "executed", "purged"])
def test_kill_9_after_a_phase_leaves_a_request_that_can_be_resumed(
    run: Path, officer: Ed25519PrivateKey, keys: Keys, phase: str
) -> None:
    ask(run, officer, keys, "client", "c1")
    process = FORK.Process(target=_carry_out_until_killed, args=(run, f"request.{phase}:1"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [standing.phase for standing in pending(run)] == [phase]
    carry_out(run, "R1")
    assert pending(run) == []
    assert check_log(run) == []


def _ask_one_by_one(folder: Path, key: bytes, labels: list[str]) -> None:
    private = Ed25519PrivateKey.from_private_bytes(key)
    keys = {fingerprint(private.public_key()): private.public_key()}
    for label in labels:
        ask(folder, private, keys, "records", *hashed([label]))


def test_two_writers_take_turns(run: Path, officer: Ed25519PrivateKey) -> None:
    halves = [[f"{side}{i}" for i in range(10)] for side in "ab"]
    processes = [FORK.Process(target=_ask_one_by_one, args=(run, officer.private_bytes_raw(), half)) for half in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert check_log(run) == []
    assert list(read_requests(run)) == [f"R{i}" for i in range(1, 21)]


def test_a_folder_without_a_run_is_named(tmp_path: Path, officer: Ed25519PrivateKey, keys: Keys) -> None:
    with pytest.raises(RunFolderError, match="requests are about a run that has begun"):
        ask(tmp_path, officer, keys, "client", "c1")
    (tmp_path / "journal.jsonl").write_text('{"event": "round_started"}\n')
    with pytest.raises(RunFolderError, match="does not begin with the line that opened the run"):
        identity(tmp_path)


# Keys --------------------------------------------------------------------------------------------------------------


def test_a_new_key_is_its_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    name = new_key(tmp_path / "keys" / "officer")
    assert (tmp_path / "keys" / "officer").stat().st_mode & 0o777 == 0o600
    assert list(authorised([tmp_path / "keys"])) == [name]
    assert list(authorised([tmp_path / "keys" / "officer.pub"])) == [name]
    assert fingerprint(load_key(tmp_path / "keys" / "officer").public_key()) == name
    with pytest.raises(ConfigError, match="is there already, and a key is never replaced"):
        new_key(tmp_path / "keys" / "officer")


def test_a_key_with_a_password_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_KEY_PASSWORD", "correct horse")
    name = new_key(tmp_path / "key")
    assert fingerprint(load_key(tmp_path / "key").public_key()) == name
    monkeypatch.setenv("FEDLORA_KEY_PASSWORD", "battery staple")
    with pytest.raises(ConfigError, match="the password in FEDLORA_KEY_PASSWORD does not open it"):
        load_key(tmp_path / "key")
    monkeypatch.delenv("FEDLORA_KEY_PASSWORD")
    with pytest.raises(ConfigError, match="is encrypted; put its password into"):
        load_key(tmp_path / "key")
    new_key(tmp_path / "open")
    monkeypatch.setenv("FEDLORA_KEY_PASSWORD", "meant for another key")
    assert load_key(tmp_path / "open")


def test_files_that_are_no_keys_are_named(tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match="is no private key in PEM"):
        load_key(tmp_path / "junk")
    with pytest.raises(ConfigError, match=r"it is a private key: give its \.pub"):
        load_public(tmp_path / "key")
    with pytest.raises(ConfigError, match="No such file"):
        load_key(tmp_path / "missing")
    with pytest.raises(ConfigError, match="there is no authorised key"):
        authorised([])
