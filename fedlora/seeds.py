"""Where every random number of a run comes from."""

import hashlib


def derive_seed(root: int, round: int, client: str, purpose: str) -> int:
    """Return a 63-bit seed that depends on nothing but its four arguments.

    The same round of the same run draws the same numbers after a crash, in any process and in
    any order of clients.
    """
    text = f"{root}\x1f{round}\x1f{client}\x1f{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
