"""Masked sums: they come out whoever drops out, and nothing else does."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureSumError, WireError
from fedlora.privacy import masks
from fedlora.privacy.fixed_point import Ring
from fedlora.privacy.messages import AskKeys, Keys, Session, decode_masked, encode_masked, read, read_request
from fedlora.privacy.secure_sum import Pair, Secrets, collect, deal, mask, needed, reveal, unmask
from fedlora.privacy.shamir import join

CLIENTS = [f"c{i}" for i in range(8)]


@dataclass
class Circle:
    """Clients that have dealt their shares."""

    session: Session
    secrets: dict[str, Secrets]
    held: dict[str, dict[str, Pair]]

    def masked(self, numbers: dict[str, Ring], clients: Collection[str]) -> dict[str, Ring]:
        return {c: mask(numbers[c], self.secrets[c], self.session, c, self.held[c]) for c in clients}

    def sum(self, masked: dict[str, Ring], helpers: Collection[str]) -> Ring:
        opened = {c: reveal(self.held[c], self.session, c, list(masked)) for c in helpers}
        total = sum(masked.values(), np.zeros_like(next(iter(masked.values()))))
        return unmask(total, self.session, self.held, opened, list(masked))


def circle(clients: Collection[str] = CLIENTS, threshold: int = 6, dealing: Collection[str] | None = None) -> Circle:
    secrets = {client: Secrets.draw() for client in clients}
    session = Session(
        round=1,
        received="0" * 64,
        threshold=threshold,
        heaviest=1,
        clip=1.0,
        keys={client: drawn.public() for client, drawn in secrets.items()},
    )
    dealt = {client: deal(secrets[client], session, client) for client in dealing or clients}
    held = {
        client: collect(
            secrets[client],
            session,
            client,
            own,
            {other: sealed[client] for other, (_, sealed) in dealt.items() if other != client},
        )
        for client, (own, _) in dealt.items()
    }
    return Circle(session, secrets, held)


def numbers(clients: Collection[str] = CLIENTS, size: int = 5) -> dict[str, Ring]:
    draw = np.random.default_rng(0)
    return {client: draw.integers(0, 1 << 64, size, np.uint64) for client in clients}


@pytest.mark.parametrize("silent", [(), ("c3",), ("c0", "c7")])
@pytest.mark.parametrize("gone", [(), ("c5",), ("c1", "c6")])
@pytest.mark.parametrize("quiet", [(), ("c4",), ("c2", "c4")])
def test_the_sum_is_exact_whoever_drops_out(
    silent: tuple[str, ...], gone: tuple[str, ...], quiet: tuple[str, ...]
) -> None:
    # silent after the keys, gone after the shares, quiet after the masked numbers
    mine = circle(threshold=2, dealing=[c for c in CLIENTS if c not in silent])
    values, survivors = numbers(), [c for c in mine.held if c not in gone]
    total = mine.sum(mine.masked(values, survivors), [c for c in survivors if c not in quiet])
    assert np.array_equal(total, sum((values[c] for c in survivors), np.zeros(5, np.uint64)))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_enough_helpers_open_the_same_sum(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 7))
    clients = CLIENTS[:count]
    threshold = data.draw(st.integers(2, count))
    survivors = data.draw(st.permutations(clients))[: data.draw(st.integers(threshold, count))]
    helpers = data.draw(st.permutations(survivors))[: data.draw(st.integers(threshold, len(survivors)))]
    mine, values = circle(clients, threshold), numbers(clients)
    total = mine.sum(mine.masked(values, survivors), helpers)
    assert np.array_equal(total, sum((values[c] for c in survivors), np.zeros(5, np.uint64)))


def test_too_few_helpers_or_survivors_open_nothing() -> None:
    mine, values = circle(threshold=6), numbers()
    masked = mine.masked(values, CLIENTS)
    with pytest.raises(SecureSumError, match="5 clients helped to open the sum, and 6 are needed"):
        mine.sum(masked, CLIENTS[:5])
    with pytest.raises(SecureSumError, match="the sum is over 5 clients, and 6 are needed"):
        mine.sum({c: masked[c] for c in CLIENTS[:5]}, CLIENTS[:5])


def test_nobody_helps_to_open_a_sum_it_is_not_in_or_over_clients_it_does_not_know() -> None:
    mine = circle(threshold=3, dealing=CLIENTS[:6])
    for survivors in (CLIENTS[1:6], CLIENTS):
        with pytest.raises(SecureSumError, match="not masked its answer with"):
            reveal(mine.held["c0"], mine.session, "c0", survivors)


@pytest.mark.parametrize("survivors", [CLIENTS, CLIENTS[:6], CLIENTS[:3]])
def test_a_client_gives_away_the_seed_share_or_the_key_share_of_a_peer_and_never_both(survivors: list[str]) -> None:
    mine = circle(threshold=3)
    opened = reveal(mine.held["c0"], mine.session, "c0", survivors)
    assert set(opened.seeds) == set(survivors)
    assert set(opened.keys) == set(CLIENTS) - set(survivors)


@pytest.mark.parametrize("clients", [3, 4, 5, 8, 9, 100, 101])
@pytest.mark.parametrize("share", [0.51, 2 / 3, 0.9, 1.0])
def test_no_two_groups_that_do_not_overlap_can_both_open_something(clients: int, share: float) -> None:
    assert 2 * needed(share, clients) > clients
    assert max(3, share * clients) <= needed(share, clients) < max(3, share * clients) + 1 + (share < 0.6)


def test_masked_numbers_look_like_any_numbers() -> None:
    mine = circle(threshold=6)
    zeros = {client: np.zeros(40_000, np.uint64) for client in CLIENTS}
    for masked in mine.masked(zeros, CLIENTS).values():
        share = masked / 2**64
        # the mean of 40,000 uniform numbers is within 5 standard deviations of 1/2, each 0.2887 / 200
        assert abs(share.mean() - 0.5) < 5 * 0.2887 / 200
        assert len(np.unique(masked)) == len(masked)


def test_the_server_and_too_few_colluders_cannot_take_one_clients_mask_off() -> None:
    # the server and the five clients c1 to c5 pool all they have; c0's mask is one with each of c0 to c7
    mine, values = circle(threshold=6), numbers()
    masked = mine.masked(values, CLIENTS)["c0"]
    for other in CLIENTS[1:6]:  # of these they know the masks with c0
        masks.add_stream(masked, _mask_between(mine, other, "c0"), -1)
    shares = {mine.session.places[c]: mine.held[c]["c0"] for c in CLIENTS[1:6]}
    for part in ("seed", "key"):
        for some in (shares, dict(list(shares.items())[:3])):
            with pytest.raises(SecureSumError, match="do not fit"):
                join({place: getattr(pair, part) for place, pair in some.items()})
    assert not np.array_equal(masked, values["c0"])
    # with one more of them, the seed opens its own mask, and c6 and c7 still hide it
    shares[mine.session.places["c6"]] = mine.held["c6"]["c0"]
    masks.add_stream(masked, join({place: pair.seed for place, pair in shares.items()}), -1)
    masks.add_stream(masked, _mask_between(mine, "c6", "c0"), -1)
    assert not np.array_equal(masked, values["c0"])
    masks.add_stream(masked, _mask_between(mine, "c7", "c0"), -1)
    assert np.array_equal(masked, values["c0"])  # so this was all that hid it


def _mask_between(mine: Circle, other: str, client: str) -> bytes:
    about = b"fedlora secure sum, masks " + mine.session.id.encode()
    return masks.agree(mine.secrets[other].masks, mine.session.keys[client].masks, about)


def test_shares_open_for_the_one_they_are_for_and_from_the_one_they_are_from() -> None:
    secrets = {client: Secrets.draw() for client in ("a", "b", "c")}
    keys = {client: drawn.public() for client, drawn in secrets.items()}
    session = Session(round=1, received="0" * 64, threshold=3, heaviest=1, clip=1.0, keys=keys)
    dealt = {client: deal(secrets[client], session, client) for client in keys}
    own, from_b, from_c = dealt["a"][0], dealt["b"][1], dealt["c"][1]
    collect(secrets["a"], session, "a", own, {"b": from_b["a"], "c": from_c["a"]})
    changed = bytes([from_b["a"][0] ^ 1]) + from_b["a"][1:]
    for sealed in (
        {"b": from_c["a"], "c": from_b["a"]},
        {"b": from_b["c"], "c": from_c["a"]},
        {"b": changed, "c": from_c["a"]},
    ):
        with pytest.raises(SecureSumError, match="does not open"):
            collect(secrets["a"], session, "a", own, sealed)
    with pytest.raises(SecureSumError, match="shares of 2 clients came, and 3 are needed"):
        collect(secrets["a"], session, "a", own, {"b": from_b["a"]})
    for stranger in ("a", "d"):
        with pytest.raises(SecureSumError, match=f"shares of {stranger}, which is not another client"):
            collect(secrets["a"], session, "a", own, {stranger: from_b["a"], "c": from_c["a"]})


def test_a_weak_public_key_is_refused() -> None:
    with pytest.raises(SecureSumError, match="weak"):
        masks.agree(masks.new_key(), bytes(32), b"anything")


def test_streams_of_one_seed_cancel_and_go_on_over_chunks() -> None:
    seed, values = bytes(range(32)), numbers(["c0"], 300_000)["c0"]
    masked = values.copy()
    masks.add_stream(masked, seed)
    assert (masked != values).all()
    assert len(np.unique(masked - values)) == len(values)
    masks.add_stream(masked, seed, -1)
    assert np.array_equal(masked, values)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b'{"stage": "shares"}',
        b'{"stage": "everything", "round": 1}',
        b'{"stage": "keys", "round": 1, "received": "../../etc/passwd"}',
        b'{"stage": "keys", "round": 1, "received": "' + b"0" * 64 + b'", "path": "/etc/passwd"}',
        b'{"stage": "keys", "round": 0, "received": "' + b"0" * 64 + b'"}',
    ],
)
def test_a_request_that_is_none_gets_a_sentence(payload: bytes) -> None:
    with pytest.raises(WireError, match="not a message of a secure sum"):
        read_request(payload)


def test_messages_come_back_as_they_were_sent() -> None:
    asked = AskKeys(round=3, received="ab" * 32)
    assert read_request(asked.encode()) == asked
    keys = Secrets.draw().public()
    assert read(Keys, keys.encode()) == keys
    session = circle(CLIENTS[:4], 3).session
    again = read(Session, session.encode())
    assert (again, again.id, list(again.places)) == (session, session.id, CLIENTS[:4])
    with pytest.raises(WireError, match="beyond"):
        read(Session, session.model_copy(update={"heaviest": 1 << 31}).encode())


def test_a_masked_answer_is_for_one_session_and_of_the_size_that_was_asked_for() -> None:
    values = numbers(["c0"])["c0"]
    payload = encode_masked("ab" * 32, values)
    assert np.array_equal(decode_masked(payload, "ab" * 32, 5), values)
    for session, count in (("cd" * 32, 5), ("ab" * 32, 4), ("ab" * 32, 6)):
        with pytest.raises(WireError, match="not the masked answer"):
            decode_masked(payload, session, count)


def test_every_set_of_survivors_of_four_opens_to_its_own_sum() -> None:
    clients = CLIENTS[:4]
    mine, values = circle(clients, 3), numbers(clients)
    for survivors in [*combinations(clients, 3), tuple(clients)]:
        total = mine.sum(mine.masked(values, survivors), survivors)
        assert np.array_equal(total, sum((values[c] for c in survivors), np.zeros(5, np.uint64)))
