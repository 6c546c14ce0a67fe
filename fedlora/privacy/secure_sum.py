"""Secure aggregation: the server learns the sum of what clients send, and no term of it.

Each client adds to its numbers a mask of its own, and one with every other client that the other takes off. Of a client
that drops out, the others' masks with it are opened by ``threshold`` shares of its key; of one that does not, its own
mask is opened by ``threshold`` shares of its seed. No client gives both shares of the same one away.

Everything here is a function of what it is given, but for fresh keys, seeds and shares.

Source: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017), section 7,
for a server that is curious and plays by the rules: keys are not signed, and there is no consistency check.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping

from fedlora.errors import SecureSumError
from fedlora.privacy.fixed_point import Ring
from fedlora.privacy.masks import KEY_BYTES, add_stream, agree, new_key, public, seal, unseal
from fedlora.privacy.messages import Keys, Message, Opened, Session
from fedlora.privacy.shamir import SHARE_BYTES, join, split

FEWEST = 3  # in a sum: one of two tells each of them what the other one sent


class Secrets(Message):
    """What a client draws for one round: its private keys, and the seed of its own mask."""

    shares: bytes
    masks: bytes
    seed: bytes

    @staticmethod
    def draw() -> Secrets:
        """New ones, from the operating system's randomness."""
        return Secrets(shares=new_key(), masks=new_key(), seed=os.urandom(KEY_BYTES))

    def public(self) -> Keys:
        """What others may know."""
        return Keys(shares=public(self.shares), masks=public(self.masks))


class Pair(Message):
    """A share of somebody's seed and one of its key. At most one of them ever leaves the client that holds them."""

    seed: bytes
    key: bytes


def needed(share: float, clients: int) -> int:
    """How many of so many clients a sum needs: the share of them, more than half, and FEWEST.

    More than half, so that no two groups of clients could open both the mask and the key of the same one.
    """
    return max(FEWEST, clients // 2 + 1, math.ceil(share * clients - 1e-9))


# Clients ----------------------------------------------------------------------------------------------------------


def deal(secrets: Secrets, session: Session, me: str) -> tuple[Pair, dict[str, bytes]]:
    """Shares of a client's secrets: its own, and everybody else's, sealed for them."""
    count = len(session.keys)
    seeds, keys = (split(secret, session.threshold, count) for secret in (secrets.seed, secrets.masks))
    pairs = {client: Pair(seed=seeds[place - 1], key=keys[place - 1]) for client, place in session.places.items()}
    own = pairs.pop(me)
    sealed = {
        other: seal(
            _between(secrets.shares, session.keys[other].shares, session), pair.seed + pair.key, _way(me, other)
        )
        for other, pair in pairs.items()
    }
    return own, sealed


def collect(secrets: Secrets, session: Session, me: str, own: Pair, sealed: Mapping[str, bytes]) -> dict[str, Pair]:
    """The shares that a client holds, its own among them.

    Raises:
        SecureSumError: if one is not from who it is said to be from, or there are fewer than the threshold.
    """
    if strange := sorted(set(sealed) - set(session.keys) | ({me} & set(sealed))):
        raise SecureSumError(f"shares of {strange[0]:.80}, which is not another client of this sum")
    if 1 + len(sealed) < session.threshold:
        raise SecureSumError(f"shares of {1 + len(sealed)} clients came, and {session.threshold} are needed")
    held = {me: own}
    for other, box in sealed.items():
        text = unseal(_between(secrets.shares, session.keys[other].shares, session), box, _way(other, me))
        held[other] = Pair(seed=text[:SHARE_BYTES], key=text[SHARE_BYTES:])
    return held


def mask(numbers: Ring, secrets: Secrets, session: Session, me: str, others: Collection[str]) -> Ring:
    """The numbers under a client's own mask and one with each of the others."""
    masked = numbers.copy()
    add_stream(masked, secrets.seed)
    for other in others:
        if other != me:
            add_stream(masked, _mask_of(secrets.masks, session.keys[other].masks, session), _sign(session, me, other))
    return masked


def reveal(held: Mapping[str, Pair], session: Session, me: str, survivors: Collection[str]) -> Opened:
    """What a client gives away to open the sum of ``survivors``; every other mask it took part in is taken off.

    Raises:
        SecureSumError: if there are too few of them, or some whose masks it has no part in.
    """
    if me not in survivors or not set(survivors) <= set(held):
        raise SecureSumError("the sum is over clients that this one has not masked its answer with")
    if len(set(survivors)) < session.threshold:
        raise SecureSumError(f"the sum is over {len(set(survivors))} clients, and {session.threshold} are needed")
    return Opened(
        seeds={client: pair.seed for client, pair in held.items() if client in survivors},
        keys={client: pair.key for client, pair in held.items() if client not in survivors},
    )


# The server -------------------------------------------------------------------------------------------------------


def unmask(
    total: Ring, session: Session, dealt: Collection[str], opened: Mapping[str, Opened], survivors: Collection[str]
) -> Ring:
    """The sum of what ``survivors`` masked.

    Args:
        total: the sum of their masked numbers; it is not changed.
        dealt: everybody whose shares were handed on, and whom the survivors masked with.
        opened: what some of them gave away, by who did.

    Raises:
        SecureSumError: if fewer than the threshold did, or what they gave does not fit together.
    """
    if len(opened) < session.threshold:
        raise SecureSumError(f"{len(opened)} clients helped to open the sum, and {session.threshold} are needed")
    helpers = sorted(opened, key=session.places.__getitem__)[: session.threshold]
    total = total.copy()
    for client in survivors:
        add_stream(total, join({session.places[h]: opened[h].seeds[client] for h in helpers}), -1)
    for gone in set(dealt) - set(survivors):
        key = join({session.places[h]: opened[h].keys[gone] for h in helpers})
        for client in survivors:
            # what the survivor has added, seen from the side of the one that is gone
            add_stream(total, _mask_of(key, session.keys[client].masks, session), -_sign(session, client, gone))
    return total


def _between(key: bytes, other: bytes, session: Session) -> bytes:
    return agree(key, other, b"fedlora secure sum, shares " + session.id.encode())


def _mask_of(key: bytes, other: bytes, session: Session) -> bytes:
    return agree(key, other, b"fedlora secure sum, masks " + session.id.encode())


def _way(sender: str, receiver: str) -> bytes:
    # the length keeps (a, bc) and (ab, c) apart
    return f"{len(sender.encode())} {sender} {receiver}".encode()


def _sign(session: Session, me: str, other: str) -> int:
    return 1 if session.places[me] < session.places[other] else -1
