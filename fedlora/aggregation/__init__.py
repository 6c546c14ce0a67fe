"""Aggregation strategies. Importing this package registers every one of them."""

from fedlora.aggregation import averaging, product
from fedlora.aggregation.base import STRATEGIES, Aggregate, Contribution, RoundContext, Strategy, Traits

__all__ = [
    "STRATEGIES",
    "Aggregate",
    "Contribution",
    "RoundContext",
    "Strategy",
    "Traits",
    "averaging",
    "product",
]
