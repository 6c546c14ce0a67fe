"""Forget rounds: which configurations can have them. In such a round the owners of rows make these unlikely."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.aggregation import Strategy
from fedlora.aggregation.local import FedProx
from fedlora.aggregation.staleness import Staleness
from fedlora.aggregation.wrapper import Wrapper
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, nearest

AS_SENT = (FedProx, Staleness)  # wrappers that leave the answers of one round as they are


def check_forgetting(strategy: Strategy, config: RunConfig, clients: Sequence[str]) -> None:
    """Raise ``ConfigError`` where the forget rounds of a configuration cannot be played.

    Args:
        clients: ids of everyone registered.
    """
    for one in config.forgetting:
        if odd := next((client for client in one.clients if client not in clients), None):
            raise ConfigError(f"forgetting.clients: there is no client {odd}{nearest(odd, clients)}")
    check_combining(strategy)


def check_combining(strategy: Strategy) -> None:
    """Raise ``ConfigError`` for a strategy that would make something else of what the owners send.

    An owner may be alone, where nobody is there to compare it with; and its change is bounded, which would mean little
    if the server enlarged it, or went on with it in the rounds after.
    """
    for layer in strategy.layers():
        if isinstance(layer, Wrapper) and not isinstance(layer, AS_SENT):
            raise ConfigError(
                f"forget rounds take the owners' answers as they come, and {layer.name} makes something else of them;"
                " use rollback, or a run without that wrapper"
            )
    traits, name = strategy.traits, strategy.layers()[-1].name
    for is_so, what in (
        (traits.personal, "keeps parts on the clients, which nobody could make forget"),
        (traits.core, "trains a core whose size says nothing of that of the update"),
        (traits.head_only, "leaves everything but the head as it is"),
    ):
        if is_so:
            raise ConfigError(f"forget rounds change the whole adapter, and {name} {what}; use rollback")
