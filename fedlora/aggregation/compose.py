"""From what a configuration says to a strategy: a name, a name with options, or a stack of wrappers over one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.aggregation.base import STRATEGIES, Strategy
from fedlora.aggregation.wrapper import WRAPPERS
from fedlora.errors import ConfigError, nearest

Spec = str | Mapping[str, Mapping[str, Any] | None] | Sequence[Any]


def compose(spec: Spec) -> Strategy:
    """Build a strategy.

    Args:
        spec: ``"flexlora"``; ``{"florist": {"tau": 0.9}}``; or a list, outermost wrapper first and the rule
            last: ``[{"server_momentum": {"beta": 0.9}}, {"clip": {"max_norm": 1.0}}, "flexlora"]``.

    Raises:
        ConfigError: unknown names or options, or a stack that is not sound.
    """
    layers = [spec] if isinstance(spec, str | Mapping) else list(spec)
    if not layers:
        raise ConfigError("strategy: the list is empty; name a rule such as flexlora")
    *wrappers, core = [_named(layer) for layer in layers]
    name, options = core
    if name in WRAPPERS:
        raise ConfigError(f"strategy: {name} is a wrapper and needs a rule after it: [{name}, flexlora]")
    _check_name(name, wrapper=False)
    names = [wrapper for wrapper, _ in wrappers]
    if twice := next((wrapper for wrapper in names if names.count(wrapper) > 1), None):
        raise ConfigError(f"strategy: {twice} stands in the stack twice; once is enough")
    strategy = STRATEGIES.create(name, **options)
    for name, options in reversed(wrappers):
        if name in STRATEGIES:
            raise ConfigError(f"strategy: {name} is a rule, and a stack has one, at its end; only wrappers come before")
        _check_name(name, wrapper=True)
        strategy = WRAPPERS.create(name, inner=strategy, **options)
    return strategy


def _named(layer: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(layer, str):
        return layer, {}
    if isinstance(layer, Mapping) and len(layer) == 1:
        ((name, options),) = layer.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise ConfigError(f"strategy: {layer!r:.80} is neither a name nor one name with its options")


def _check_name(name: str, wrapper: bool) -> None:
    registry = WRAPPERS if wrapper else STRATEGIES
    if name not in registry:
        what = "wrapper" if wrapper else "strategy"
        # of the kind that belongs here first: rolora is as near to olora as o_lora is, and is no wrapper
        hint = nearest(name, registry) or nearest(name, [*STRATEGIES, *WRAPPERS])
        raise ConfigError(f"{what}: {name} is not known{hint} (known: {', '.join(registry)})")
