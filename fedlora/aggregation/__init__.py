"""Aggregation strategies. Importing this package registers every one of them, and every wrapper.

What the author of a strategy needs can be imported from here: the contract, its values, and their algebra.
"""

from fedlora.adapter.algebra import add, inner, mean_dense, mean_factors, mean_update, norm, scaled, stack, subtract
from fedlora.adapter.rank import first, pad, resize, truncate
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.aggregation import (
    alternating,
    averaging,
    clip,
    coordinate,
    corrected,
    dp,
    head_only,
    local,
    product,
    protection,
    prototypes,
    robust,
    server_opt,
    shared,
    stacking,
    staleness,
    subspace,
)
from fedlora.aggregation.averaging import require_equal_ranks
from fedlora.aggregation.base import STRATEGIES, Aggregate, Contribution, RoundContext, State, Strategy, Traits
from fedlora.aggregation.compose import compose
from fedlora.aggregation.traffic import Traffic
from fedlora.aggregation.wrapper import WRAPPERS, Wrapper, part
from fedlora.protocol import ClientInfo, Method, TrainPlan

__all__ = [
    "STRATEGIES",
    "WRAPPERS",
    "AdapterState",
    "Aggregate",
    "ClientInfo",
    "Contribution",
    "LowRank",
    "Method",
    "RoundContext",
    "State",
    "Strategy",
    "Traffic",
    "TrainPlan",
    "Traits",
    "Wrapper",
    "add",
    "alternating",
    "averaging",
    "clip",
    "compose",
    "coordinate",
    "corrected",
    "dp",
    "first",
    "head_only",
    "inner",
    "local",
    "mean_dense",
    "mean_factors",
    "mean_update",
    "norm",
    "pad",
    "part",
    "product",
    "protection",
    "prototypes",
    "require_equal_ranks",
    "resize",
    "robust",
    "scaled",
    "server_opt",
    "shared",
    "stack",
    "stacking",
    "staleness",
    "subspace",
    "subtract",
    "truncate",
]
