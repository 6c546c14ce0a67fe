"""Certificates: what they say, and that no edit of them or of what they speak of goes unseen."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.errors import RunFolderError, UnlearningError
from fedlora.unlearning.canonical import canonical, digest
from fedlora.unlearning.chain import link
from fedlora.unlearning.keys import Keys, fingerprint, sign
from fedlora.unlearning.request import Request, sign_request
from orchestrator.stores.files import file_sha256, open_folder, read_config
from orchestrator.unlearning.artefacts import snapshot
from orchestrator.unlearning.certificate import Outcome, verify_certificate, write_certificate
from orchestrator.unlearning.certificate_page import certificate_page
from orchestrator.unlearning.gate import altered, kept_measurements, look_again, measurements, stale
from orchestrator.unlearning.requests import LOG, advance, find_request, identity, receive
from orchestrator.unlearning.rollback import Rollback

FORK = multiprocessing.get_context("fork")
VERDICT = {"passed": True, "forget": {"auc": 0.51, "n": 120, "tests": ["loss", "min-k"]}, "note": "<b>5 & 6</b>"}
ADAPTER, CHECKPOINT = "adapter/adapter_model.safetensors", "checkpoints/round-0002/state.json"


def purge(folder: Path, key: Ed25519PrivateKey, keys: Keys, client: str, level: str = "E1") -> tuple[str, Outcome]:
    """A request up to its purge: the adapter is another one, and the checkpoint is gone."""
    before = snapshot(folder)
    name = receive(folder, sign_request(Request("client", (client,)), identity(folder), key), keys).id
    (folder / ADAPTER).write_text(f"weights without {client}")
    removed = {CHECKPOINT: before[CHECKPOINT]} if CHECKPOINT in before else {}
    for path in removed:
        (folder / path).unlink()
    for phase in ("planned", "executed", "verified", "purged"):
        advance(folder, name, phase, {"level": level} if phase == "executed" else {})
    return name, Outcome("rollback", before, {**removed, "redis: stream fedlora:1:events": ""}, VERDICT, ["Mind c3."])


@pytest.fixture
def certified(run: Path, officer: Ed25519PrivateKey, keys: Keys) -> Path:
    """A run without c1, with a certificate of that."""
    name, outcome = purge(run, officer, keys, "c1")
    assert write_certificate(run, name, outcome, officer) == run / "unlearning" / "R1.json"
    return run


def test_a_certificate_says_what_was_done_and_what_is_not_promised(certified: Path, keys: Keys) -> None:
    assert verify_certificate(certified, "R1", keys) == []
    statement = json.loads((certified / "unlearning" / "R1.json").read_text())["statement"]
    assert statement["request"]["target"] == ["c1"]
    assert (statement["action"], statement["level"]["code"]) == ("rollback", "E1")
    assert statement["level"]["meaning"].startswith("Exact: what is left is byte for byte")
    assert statement["verdict"] == VERDICT
    assert CHECKPOINT in statement["artefacts"]["before"]
    assert CHECKPOINT not in statement["artefacts"]["after"]
    assert statement["purged"][CHECKPOINT] == statement["artefacts"]["before"][CHECKPOINT]
    assert "that others hold" in statement["residual_risk"][0]
    assert statement["residual_risk"][-1] == "Mind c3."


def test_the_page_is_complete_in_itself_and_shows_it_all(certified: Path) -> None:
    page = (certified / "unlearning" / "R1.html").read_text()
    assert not re.search(r"(src|href)=|<script|https?://", page)
    for shown in ("level E1", "client c1", "forget.auc", "0.51", "forget.n", "Mind c3.", ADAPTER, "&lt;b&gt;5 &amp; 6"):
        assert shown in page
    statement = json.loads((certified / "unlearning" / "R1.json").read_text())["statement"]
    suppressed = certificate_page({**statement, "level": {"code": "S", "meaning": "x"}})
    assert '<span class="status failed">level S' in suppressed


def test_exports_that_are_known_are_listed_as_residual_risk(run: Path, officer: Ed25519PrivateKey, keys: Keys) -> None:
    line = {"time": "2026-01-05T10:00:00", "path": "/srv/model", "kind": "merged", "round": 2, "weights": {}}
    (run / "exports.jsonl").write_text(json.dumps(line) + "\n")
    name, outcome = purge(run, officer, keys, "c1")
    write_certificate(run, name, outcome, officer)
    assert (
        "On 2026-01-05 the merged after round 2 was exported to /srv/model" in (run / "unlearning/R1.json").read_text()
    )


def test_a_request_that_is_certified_keeps_its_certificate(certified: Path, officer: Ed25519PrivateKey) -> None:
    before = (certified / "unlearning" / "R1.json").read_bytes()
    write_certificate(certified, "R1", Outcome("npo", {}, {}, {}), officer)
    assert (certified / "unlearning" / "R1.json").read_bytes() == before


def test_nothing_is_certified_before_its_purge_or_while_purged_content_is_there(
    run: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    name, outcome = purge(run, officer, keys, "c1")
    (run / "checkpoints" / "copy.json").write_text("{}")
    with pytest.raises(UnlearningError, match=r"not complete: checkpoints/copy\.json holds what was purged as"):
        write_certificate(run, name, outcome, officer)
    (run / "checkpoints" / "copy.json").unlink()
    receive(run, sign_request(Request("client", ("c2",)), identity(run), officer), keys)
    with pytest.raises(UnlearningError, match="R2 is received; only a request that is purged can be certified"):
        write_certificate(run, "R2", outcome, officer)
    with pytest.raises(UnlearningError, match="cannot be hashed or signed"):
        write_certificate(run, name, Outcome("rollback", {}, {}, {"auc": float("inf")}), officer)
    assert verify_certificate(run, "R1", keys) == ["R1 is purged; it has no certificate"]


def test_what_a_later_request_drew_anew_from_a_seed_is_no_trace(
    certified: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    content = "{}"  # of the checkpoint that R1 purged
    (certified / "private.json").write_text(content)
    assert len(verify_certificate(certified, "R1", keys)) == 1
    name, outcome = purge(certified, officer, keys, "c2")
    write_certificate(certified, name, outcome, officer)
    assert len(verify_certificate(certified, "R1", keys)) == 1  # R2 found it there
    (certified / "private.json").unlink()
    name, outcome = purge(certified, officer, keys, "c3")
    fresh = certified / "checkpoints" / "round-0000" / "state.json"
    fresh.parent.mkdir(parents=True)
    fresh.write_text(content)
    write_certificate(certified, name, outcome, officer)
    assert verify_certificate(certified, "R1", keys) == []


def test_measurements_go_with_the_rows_they_were_made_on(run: Path, officer: Ed25519PrivateKey, keys: Keys) -> None:
    def carry_out(client: str, level: str, measured: str = "") -> None:
        name = receive(
            run,
            sign_request(Request("client", (client,), "npo" if level == "A" else "rollback"), identity(run), officer),
            keys,
        ).id
        plan = Rollback((client,), (), (), 1, 0, 2, level)
        purged: dict[str, str] = {}
        if measured:
            measurements(run, name).write_text(measured)
        elif purged := stale(run, plan):
            for path in purged:
                (run / path).unlink()
        told = {"measurements_sha256": file_sha256(measurements(run, name))} if measured else {}
        phases = {"planned": {"plan": asdict(plan)}, "executed": {"level": level}, "verified": told}
        for phase, facts in {**phases, "purged": {"files": purged}, "certified": {}}.items():
            advance(run, name, phase, facts)

    carry_out("c1", "A", "losses of c1")
    carry_out("c2", "A", "losses of c2")
    assert list(stale(run, Rollback(("c3",), (), (), 1, 0, 2, "E1"))) == []
    carry_out("c1", "E1")
    assert find_request(run, "R3").facts["purged"]["files"] == {
        "unlearning/R1.measured.json": hashlib.sha256(b"losses of c1").hexdigest()
    }
    assert altered(run, find_request(run, "R1")) == []
    with pytest.raises(UnlearningError, match="R3 erased what R1 was about, and what was measured on it; verify R3"):
        look_again(run, "R1")
    (sentence,) = kept_measurements(run)
    assert sentence.startswith("unlearning/R2.measured.json keeps the losses of rows by their places")
    measurements(run, "R1").write_text("losses of c1")
    assert "was purged by R3, and is there again" in altered(run, find_request(run, "R1"))[0]


# Edits -------------------------------------------------------------------------------------------------------------

CERTIFIED = ["unlearning/R1.json", "unlearning/R1.html", LOG, "journal.jsonl", ADAPTER, "config.yaml", "partition.json"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_what_was_certified_is_found(certified: Path, keys: Keys, data: st.DataObject) -> None:
    path = certified / data.draw(st.sampled_from(CERTIFIED))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    try:
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        assert verify_certificate(certified, "R1", keys)
    finally:
        path.write_bytes(whole)
    assert verify_certificate(certified, "R1", keys) == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("unlearning/R1.json", r"cannot read .*R1\.json"),
        ("unlearning/R1.html", r"R1\.html is missing"),
        (LOG, "there is no request R1"),
        ("journal.jsonl", "cannot be read"),
        (ADAPTER, "was certified and is missing"),
    ],
)
def test_whatever_is_removed_is_missed(certified: Path, keys: Keys, path: str, problem: str) -> None:
    (certified / path).unlink()
    (found,) = verify_certificate(certified, "R1", keys)
    assert re.search(problem, found)


def test_what_was_purged_is_found_when_it_comes_back_under_another_name(certified: Path, keys: Keys) -> None:
    (certified / "spare.bin").write_text("{}")
    (found,) = verify_certificate(certified, "R1", keys)
    assert found.startswith(f"spare.bin holds what was purged as {CHECKPOINT}")


def test_lines_cut_off_the_end_of_the_log_are_missed(certified: Path, keys: Keys) -> None:
    lines = (certified / LOG).read_bytes().splitlines(keepends=True)
    (certified / LOG).write_bytes(b"".join(lines[:-1]))
    assert verify_certificate(certified, "R1", keys) == ["R1 is purged; it has no certificate"]


def test_the_journal_may_grow_and_the_run_may_be_moved(certified: Path, keys: Keys, tmp_path: Path) -> None:
    with (certified / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "run_resumed"}\n')
    assert verify_certificate(certified, "R1", keys) == []
    assert verify_certificate(certified.rename(tmp_path / "elsewhere"), "R1", keys) == []


# Forgeries ---------------------------------------------------------------------------------------------------------


def forge(folder: Path, key: Ed25519PrivateKey, **changes: object) -> None:
    """Write another statement, sign it, and make the log's last line fit to it, as somebody with the folder could."""
    path = folder / "unlearning" / "R1.json"
    certificate = json.loads(path.read_text())
    statement = certificate["statement"] | changes | {"issuer": changes.get("issuer", fingerprint(key.public_key()))}
    signed = {"statement": statement, "page_sha256": certificate["page_sha256"]}
    path.write_text(json.dumps(signed | {"signature": sign(key, signed)}, indent=2) + "\n")
    *lines, last = (folder / LOG).read_bytes().splitlines()
    record = json.loads(last)
    record["facts"]["certificate_sha256"] = snapshot(folder / "unlearning")["R1.json"]
    content = {key: value for key, value in record.items() if key not in ("sha256", "previous")}
    (folder / LOG).write_bytes(b"\n".join([*lines, canonical(link(record["previous"], content))]) + b"\n")


def test_a_certificate_by_a_key_that_is_not_authorised_is_rejected(certified: Path, keys: Keys) -> None:
    stranger = Ed25519PrivateKey.generate()
    forge(certified, stranger)
    (found,) = verify_certificate(certified, "R1", keys)
    assert f"signed by the key {fingerprint(stranger.public_key())[:16]}, which is not authorised" in found


def test_a_forged_signature_in_the_name_of_an_authorised_key_is_rejected(certified: Path, keys: Keys) -> None:
    (name,) = keys
    forge(certified, Ed25519PrivateKey.generate(), issuer=name)
    (found,) = verify_certificate(certified, "R1", keys)
    assert "does not bear the signature of its issuer: it was altered or forged" in found


def test_a_level_beyond_the_one_in_the_log_is_found_even_with_a_good_signature(
    certified: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    forge(certified, officer, level={"code": "E2", "meaning": "x"})
    assert "the certificate claims another level than R1 reached, E1" in verify_certificate(certified, "R1", keys)
    forge(certified, officer, request={"id": "R9"})
    assert any("speaks of another request than R1" in found for found in verify_certificate(certified, "R1", keys))


def test_a_log_written_anew_from_its_first_line_does_not_fit_the_certificate(certified: Path, keys: Keys) -> None:
    records = [json.loads(line) for line in (certified / LOG).read_bytes().splitlines()]
    previous, lines = records[0]["previous"], []
    for record in records:
        content = {key: value for key, value in record.items() if key not in ("sha256", "previous")}
        lines.append(link(previous, content | {"time": record["time"].replace("20", "19", 1)}))
        previous = digest({key: value for key, value in lines[-1].items() if key != "sha256"})
    (certified / LOG).write_bytes(b"".join(canonical(line) + b"\n" for line in lines))
    assert len(verify_certificate(certified, "R1", keys)) == 2


# One after the other, and killed in between ------------------------------------------------------------------------


def test_a_later_certificate_takes_over_what_it_replaced(
    certified: Path, officer: Ed25519PrivateKey, keys: Keys
) -> None:
    name, outcome = purge(certified, officer, keys, "c2")
    assert verify_certificate(certified, "R1", keys) == [f"{ADAPTER} is not what was certified"]
    write_certificate(certified, name, outcome, officer)
    assert verify_certificate(certified, "R1", keys) == []
    assert verify_certificate(certified, "R2", keys) == []
    (certified / ADAPTER).write_text("weights")
    assert verify_certificate(certified, "R1", keys) == [f"{ADAPTER} is not what was certified"]


def _certify_until_killed(folder: Path, key: bytes, outcome: Outcome, failpoint: str) -> None:
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    write_certificate(folder, "R1", outcome, Ed25519PrivateKey.from_private_bytes(key))


@pytest.mark.parametrize("place", ["certificate.written", "certificate.shown", "request.certified"])
def test_kill_9_while_certifying_then_again_gives_one_certificate(
    run: Path, officer: Ed25519PrivateKey, keys: Keys, place: str
) -> None:
    name, outcome = purge(run, officer, keys, "c1")
    arguments = (run, officer.private_bytes_raw(), outcome, f"{place}:1")
    process = FORK.Process(target=_certify_until_killed, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert find_request(run, name).phase == ("certified" if place == "request.certified" else "purged")
    write_certificate(run, name, outcome, officer)
    assert verify_certificate(run, name, keys) == []
    assert sorted(path.name for path in (run / "unlearning").iterdir()) == [
        ".lock",
        "R1.html",
        "R1.json",
        "requests.jsonl",
    ]


def test_a_run_with_an_audit_record_is_not_overwritten(certified: Path) -> None:
    config = read_config(certified)
    with pytest.raises(RunFolderError, match="holds requests to unlearn .* must outlive the run"):
        open_folder(config, overwrite=True)
    assert (certified / LOG).exists()
