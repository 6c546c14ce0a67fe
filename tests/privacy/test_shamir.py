"""Secrets in shares: enough of them give the secret back, and fewer fit every secret."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureSumError
from fedlora.privacy.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, join, split

SECRETS = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


@settings(max_examples=50, deadline=None)
@given(secret=SECRETS, data=st.data())
def test_any_threshold_of_the_shares_give_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(split(secret, threshold, count), 1))
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    places = data.draw(st.permutations(list(shares)))[: data.draw(st.integers(threshold, count))]
    assert join({place: shares[place] for place in places}) == secret


@settings(max_examples=50, deadline=None)
@given(secret=SECRETS, other=SECRETS, data=st.data())
def test_one_share_too_few_fits_any_other_secret_as_well(secret: bytes, other: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 8))
    threshold = data.draw(st.integers(2, count))
    shares = dict(enumerate(split(secret, threshold, count), 1))
    known = dict(itertools.islice(shares.items(), threshold - 1))
    # the polynomial through what is known and the other secret at 0 has a value at one more place
    points = {0: int.from_bytes(other), **{place: int.from_bytes(share) for place, share in known.items()}}
    value = sum(
        y * _product([(threshold - x2) * pow(x1 - x2, -1, PRIME) for x2 in points if x2 != x1])
        for x1, y in points.items()
    )
    assert join({**known, threshold: (value % PRIME).to_bytes(SHARE_BYTES)}) == other


def test_shares_that_do_not_belong_together_are_noticed() -> None:
    one, two = (dict(enumerate(split(bytes([i]) * SECRET_BYTES, 3, 5), 1)) for i in (1, 2))
    with pytest.raises(SecureSumError, match="3 shares do not fit together"):
        join({1: one[1], 2: one[2], 3: two[3]})
    with pytest.raises(SecureSumError, match="2 shares do not fit together"):
        join({1: one[1], 2: one[2]})


def test_the_field_is_one() -> None:
    # Lucas and Lehmer: 2**521 - 1 is prime exactly if this ends at 0
    state = 4
    for _ in range(521 - 2):
        state = (state * state - 2) % PRIME
    assert state == 0
    assert PRIME > 1 << 8 * SECRET_BYTES


def _product(numbers: list[int]) -> int:
    result = 1
    for number in numbers:
        result = result * number % PRIME
    return result
