"""What a client in a secure sum refuses: whatever would tell the server more than a sum of enough clients."""

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.secure import SecureClient
from fedlora.errors import SecureSumError
from fedlora.privacy.messages import (
    AskKeys,
    AskMasked,
    AskOpened,
    AskShares,
    Keys,
    Opened,
    Sealed,
    Session,
    decode_masked,
    read,
)
from fedlora.privacy.secure_sum import Secrets
from fedlora.protocol import TrainPlan, TrainTask

NAMES = [f"c{i}" for i in range(4)]
RECEIVED = "ab" * 32
DELTA = {"q:A": torch.tensor([[0.5, -0.25]])}


class Circle:
    """Four clients and a server that may ask for anything."""

    def __init__(self, root: Path):
        self.clients = SecureClient(root, threshold=0.66)

    def keys(self, number: int = 1, received: str = RECEIVED) -> dict[str, Keys]:
        asked = AskKeys(round=number, received=received).encode()
        return {name: read(Keys, self.clients.answer(name, asked)) for name in NAMES}

    def session(self, number: int = 1, received: str = RECEIVED, **changes: Any) -> Session:
        told: dict[str, Any] = {"round": number, "received": received, "threshold": 3, "heaviest": 10, "clip": 1.0}
        return Session(**{**told, "keys": changes.pop("keys", None) or self.keys(number, received), **changes})

    def shares(self, session: Session) -> dict[str, Sealed]:
        asked = AskShares(session=session).encode()
        return {name: read(Sealed, self.clients.answer(name, asked)) for name in session.keys}

    def masked(
        self, session: Session, sealed: dict[str, Sealed], name: str, delta: Any = DELTA, rows: int = 4, **task: Any
    ) -> bytes:
        shares = {other: box.shares[name] for other, box in sealed.items() if other != name}
        asked = AskMasked(session=session.id, shares=shares).encode().decode()
        told = {"round": session.round, "received": session.received, **task}
        whole = TrainTask(client=name, plan=TrainPlan(1), adapter=b"", seed=0, mask=asked, **told)
        return self.clients.masked(whole, delta, rows, {"loss": 1.0})

    def opened(self, session: Session, name: str, survivors: list[str]) -> Opened:
        return read(Opened, self.clients.answer(name, AskOpened(session=session.id, survivors=survivors).encode()))


@pytest.fixture
def circle(tmp_path: Path) -> Circle:
    return Circle(tmp_path)


def test_a_round_by_hand(circle: Circle) -> None:
    session = circle.session()
    sealed = circle.shares(session)
    for name in NAMES:
        decode_masked(circle.masked(session, sealed, name), session.id, 2 + 8)
    assert set(circle.opened(session, "c0", NAMES[:3]).keys) == {"c3"}


def test_secrets_are_for_nobody_elses_eyes(circle: Circle, tmp_path: Path) -> None:
    circle.shares(circle.session())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_no_shares_for_others_than_it_has_drawn_keys_with(circle: Circle) -> None:
    keys = circle.keys()
    stranger = Secrets.draw().public()
    for session, reason in (
        (circle.session(keys={**keys, "c0": stranger}), "the keys that go round as its own are others"),
        (circle.session(keys={name: keys[name] for name in NAMES[1:]}), "the keys that go round as its own are others"),
        (circle.session(keys={**keys, "c2": keys["c1"]}), "two clients have the same key"),
        (circle.session(keys=keys, round=2), "has drawn no keys for round 2"),
        (circle.session(keys=keys, received="cd" * 32), "has drawn no keys for round 1"),
    ):
        with pytest.raises(SecureSumError, match=reason):
            circle.clients.answer("c0", AskShares(session=session).encode())


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_a_threshold_below_its_own_is_refused_on_the_client_too(circle: Circle, threshold: int) -> None:
    session = circle.session(threshold=threshold)
    with pytest.raises(
        SecureSumError, match=f"would open with {threshold}; this client takes part in one of 3 or more"
    ):
        circle.clients.answer("c0", AskShares(session=session).encode())


def test_two_clients_are_too_few_whatever_the_threshold(circle: Circle) -> None:
    keys = circle.keys()
    session = circle.session(keys={name: keys[name] for name in NAMES[:2]}, threshold=2)
    with pytest.raises(SecureSumError, match="one of 3 or more"):
        circle.clients.answer("c0", AskShares(session=session).encode())


def test_shares_are_dealt_among_one_set_of_clients_alone(circle: Circle) -> None:
    keys = circle.keys()
    session = circle.session(keys=keys)
    circle.shares(session)
    circle.shares(session)  # asked again after an answer was lost
    other = circle.session(keys={name: keys[name] for name in NAMES[:3]})
    with pytest.raises(SecureSumError, match="has dealt its shares among other clients already"):
        circle.clients.answer("c0", AskShares(session=other).encode())


def test_a_mask_is_for_the_task_it_was_made_for(circle: Circle) -> None:
    session = circle.session()
    sealed = circle.shares(session)
    for odd in ({"round": 2}, {"received": "cd" * 32}):
        with pytest.raises(SecureSumError, match="the mask is not for the task of round"):
            circle.masked(session, sealed, "c0", **odd)


def test_one_mask_hides_one_answer(circle: Circle) -> None:
    session = circle.session()
    sealed = circle.shares(session)
    first = circle.masked(session, sealed, "c0")
    assert circle.masked(session, sealed, "c0") == first  # asked again after an answer was lost
    with pytest.raises(SecureSumError, match="both would tell their difference"):
        circle.masked(session, sealed, "c0", delta={"q:A": torch.tensor([[0.5, 0.25]])})
    with pytest.raises(SecureSumError, match="both would tell their difference"):
        circle.masked(session, {name: sealed[name] for name in NAMES[:3]}, "c0")


def test_too_few_shares_hide_nothing(circle: Circle) -> None:
    session = circle.session()
    sealed = circle.shares(session)
    with pytest.raises(SecureSumError, match="shares of 2 clients came, and 3 are needed"):
        circle.masked(session, {name: sealed[name] for name in NAMES[:2]}, "c0")


def test_a_weight_that_the_sum_has_no_room_for_is_refused(circle: Circle) -> None:
    session = circle.session(heaviest=3)
    with pytest.raises(SecureSumError, match="its 4 rows weigh more than the 3"):
        circle.masked(session, circle.shares(session), "c0")


def test_a_task_without_a_mask_gets_no_answer(circle: Circle) -> None:
    task = TrainTask(1, "c0", TrainPlan(1), b"", RECEIVED, 0)
    with pytest.raises(SecureSumError, match="c0 sends its change under a mask only, and the task has none"):
        circle.clients.masked(task, DELTA, 4, {})


def played(circle: Circle, number: int = 1, received: str = RECEIVED) -> Session:
    session = circle.session(number, received)
    sealed = circle.shares(session)
    for name in NAMES:
        circle.masked(session, sealed, name)
    return session


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        (NAMES[:2], "the sum is over 2 clients, and 3 are needed"),
        (["c0", "c0", "c1"], "the sum is over 2 clients, and 3 are needed"),
        (NAMES[1:], "not masked its answer with"),
        ([*NAMES, "c9"], "not masked its answer with"),
    ],
)
def test_sums_of_too_few_or_of_strangers_stay_closed(circle: Circle, survivors: list[str], reason: str) -> None:
    session = played(circle)
    with pytest.raises(SecureSumError, match=reason):
        circle.opened(session, "c0", survivors)


def test_nobody_opens_before_it_has_sent_anything(circle: Circle) -> None:
    session = circle.session()
    circle.shares(session)
    with pytest.raises(SecureSumError, match="has sent no answer under a mask of this sum"):
        circle.opened(session, "c0", NAMES)


def test_a_request_that_contradicts_an_earlier_one_is_refused(circle: Circle) -> None:
    session = played(circle)
    first = circle.opened(session, "c0", NAMES)
    assert circle.opened(session, "c0", NAMES[::-1]) == first  # asked again after an answer was lost
    with pytest.raises(SecureSumError, match="over 4 clients, and now it is over 3: the two would tell"):
        circle.opened(session, "c0", NAMES[:3])


def test_a_round_that_is_repeated_opens_over_the_same_clients_or_not_at_all(circle: Circle) -> None:
    circle.opened(played(circle), "c0", NAMES[:3])
    again = played(circle)  # new keys, the same task: with c3, the two sums would tell what c3 sent
    with pytest.raises(
        SecureSumError, match="has helped to open the sum of round 1 over 3 clients, and now it is over 4"
    ):
        circle.opened(again, "c0", NAMES)
    assert set(circle.opened(again, "c0", NAMES[:3]).keys) == {"c3"}
    circle.opened(played(circle, number=2), "c0", NAMES)  # another round is another matter
    circle.opened(played(circle, number=1, received="cd" * 32), "c0", NAMES)


def test_secrets_of_a_round_are_gone_when_the_next_one_begins(circle: Circle) -> None:
    first = played(circle)
    circle.keys(2)
    with pytest.raises(SecureSumError, match="has sent no answer under a mask of this sum"):
        circle.opened(first, "c0", NAMES)


def test_a_client_that_was_never_asked_for_keys_says_so(circle: Circle) -> None:
    with pytest.raises(SecureSumError, match="has drawn no keys"):
        circle.opened(circle.session(), "c9", NAMES)
