"""Which client trains at which rank."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.errors import ConfigError
from fedlora.seeds import derive_seed

_UNITS = {"by_memory_gb": "GB", "by_speed": "examples/s"}


def assign_ranks(
    clients: Sequence[str],
    spec: Sequence[int] | Mapping[str, Mapping[int, float]] | None,
    default: int,
    declared: Sequence[float] | None,
    seed: int,
) -> dict[str, int]:
    """Rank of every client.

    Args:
        clients: ids in their fixed order.
        spec: ranks dealt in turn; ``{"distribution": {rank: share}}``, whose counts match the shares as
            closely as whole clients can and are then shuffled; ``{"by_memory_gb": {rank: least}}`` or
            ``{"by_speed": {rank: least}}``, the largest rank whose need the client meets.
        default: rank of everyone where ``spec`` is None.
        declared: what clients say of themselves, dealt in turn: memory in GB, or examples per second.
        seed: the run's root seed.

    Raises:
        ConfigError: if a client meets no rank's need.
    """
    if spec is None:
        return dict.fromkeys(clients, default)
    if not isinstance(spec, Mapping):
        return {client: spec[i % len(spec)] for i, client in enumerate(clients)}
    if "distribution" in spec:
        return _by_share(clients, spec["distribution"], seed)
    kind, needs = next(iter(spec.items()))
    return _by_need(clients, needs, declared or [0.0], _UNITS[kind])


def _by_need(
    clients: Sequence[str], needs: Mapping[int, float], declared: Sequence[float], unit: str
) -> dict[str, int]:
    chosen = {}
    for i, client in enumerate(clients):
        has = declared[i % len(declared)]
        fitting = [rank for rank, least in needs.items() if has >= least]
        if not fitting:
            least = min(needs.values())
            raise ConfigError(
                f"clients.ranks: {client} declares {has} {unit}, less than any rank needs ({least} {unit})"
            )
        chosen[client] = max(fitting)
    return chosen


def _by_share(clients: Sequence[str], shares: Mapping[int, float], seed: int) -> dict[str, int]:
    total = sum(shares.values())
    if not total > 0 or min(shares.values()) < 0:
        raise ConfigError(f"clients.ranks: shares must be positive, not {dict(shares)}")
    exact = {rank: len(clients) * share / total for rank, share in shares.items()}
    counts = {rank: int(value) for rank, value in exact.items()}
    # largest remainder: whole clients that match the shares as closely as they can
    leftover = len(clients) - sum(counts.values())
    for rank in sorted(exact, key=lambda rank: (counts[rank] - exact[rank], rank))[:leftover]:
        counts[rank] += 1
    dealt = [rank for rank in sorted(counts) for _ in range(counts[rank])]
    order = np.random.default_rng(derive_seed(seed, 0, "", "ranks")).permutation(len(dealt))
    return {client: dealt[i] for client, i in zip(clients, order, strict=True)}
