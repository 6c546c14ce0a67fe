"""Which client trains at which rank."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.errors import ConfigError
from fedlora.seeds import derive_seed


def assign_ranks(
    clients: Sequence[str],
    spec: Sequence[int] | Mapping[str, Mapping[int, float]] | None,
    default: int,
    memory_gb: Sequence[float] | None,
    seed: int,
) -> dict[str, int]:
    """Rank of every client.

    Args:
        clients: ids in their fixed order.
        spec: ranks dealt in turn; ``{"distribution": {rank: share}}``, whose counts match the shares as
            closely as whole clients can and are then shuffled; or ``{"by_memory_gb": {rank: least}}``,
            the largest rank whose need the client's declared memory meets.
        default: rank of everyone where ``spec`` is None.
        memory_gb: declared memory, dealt in turn.
        seed: the run's root seed.

    Raises:
        ConfigError: if a client's memory meets no rank's need.
    """
    if spec is None:
        return dict.fromkeys(clients, default)
    if not isinstance(spec, Mapping):
        return {client: spec[i % len(spec)] for i, client in enumerate(clients)}
    if "distribution" in spec:
        return _by_share(clients, spec["distribution"], seed)
    needs = sorted(((least, rank) for rank, least in spec["by_memory_gb"].items()), reverse=True)
    given = {client: (memory_gb or [0.0])[i % len(memory_gb or [0.0])] for i, client in enumerate(clients)}
    chosen = {}
    for client, memory in given.items():
        fitting = [rank for least, rank in needs if memory >= least]
        if not fitting:
            raise ConfigError(
                f"clients.ranks: {client} declares {memory} GB, less than any rank needs ({needs[-1][0]} GB)"
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
