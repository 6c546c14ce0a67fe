"""What ``fedlora strategies list`` and ``show`` say: the rules and wrappers there are, and each of them in full."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedlora.aggregation import STRATEGIES, WRAPPERS, Strategy, Traffic
from fedlora.errors import ConfigError, nearest
from fedlora.registry import Registry
from orchestrator.units import human_bytes

# the word for a trait, and what it promises
TRAITS = {
    "exact": ("exact", "the new model is the weighted mean of what the clients trained"),
    "linear": ("linear", "the result is a linear function of what the clients send"),
    "mixed_ranks": ("mixed ranks", "clients may have different ranks; otherwise everyone trains at the smallest"),
    "fixed_gauge": ("fixed basis", "factor coordinates keep their meaning from round to round"),
    "patches_base": ("ledger", "a part of the update goes into the base"),
    "personal": ("personal", "clients keep a part of the adapter, and each is scored with its own"),
    "weighted": ("given weights", "the weights it is given are those it uses"),
    "idempotent": ("idempotent", "equal updates come back unchanged"),
    "core": ("core", "a core between two fixed factors is trained"),
}
LISTED = ("exact", "linear", "mixed_ranks", "fixed_gauge", "patches_base", "personal")
TRAVELS = {
    "up": "to the server",
    "down": "to the client",
    "patch": "at most, into the base and once to every client",
    "extras": "beside the factors, both ways",
}
SIDE, RANK, CLIENTS = 768, 8, 10  # of the worked example


def listing() -> dict[str, list[dict[str, Any]]]:
    """Every rule and wrapper in a line, as plain data."""
    rules = []
    for name in STRATEGIES:
        traits = getattr(_made(name) or STRATEGIES[name], "traits", None)
        listed = {TRAITS[trait][0].replace(" ", "_"): getattr(traits, trait, None) for trait in LISTED}
        rules.append({**_head(STRATEGIES, name), **listed})
    wrappers = [{**_head(WRAPPERS, name), "over": list(_stacks(name))} for name in WRAPPERS]
    return {"strategies": rules, "wrappers": wrappers}


def print_listing(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Two tables."""
    rules = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("strategy", "ranks", "promises", "what the server computes"):
        rules.add_column(head, overflow="fold")
    for row in found["strategies"]:
        promises = [name.replace("_", " ") for name in ("exact", "linear", "fixed_basis", "ledger", "personal")]
        kept = ", ".join(word for word in promises if row[word.replace(" ", "_")])
        rules.add_row(row["name"], "any" if row["mixed_ranks"] else "equal", kept, _line(row))
    wrappers = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("wrapper", "over", "what it adds"):
        wrappers.add_column(head, overflow="fold")
    for row in found["wrappers"]:
        wrappers.add_row(row["name"], _rules_in_words(row["over"]), _line(row))
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # what reads it can cut lines; a table of 80 columns cannot be widened
    for table in (rules, "", wrappers, "", "One of them in full: fedlora strategies show NAME"):
        console.print(table)


def describe(name: str) -> dict[str, Any]:
    """All that is known of a rule or wrapper, as plain data.

    Raises:
        ConfigError: for a name that nobody registered.
    """
    if name not in STRATEGIES and name not in WRAPPERS:
        raise ConfigError(f"strategies: {name} is not known{nearest(name, [*STRATEGIES, *WRAPPERS])}")
    wrapper = name not in STRATEGIES
    registry: Registry[Any] = WRAPPERS if wrapper else STRATEGIES
    factory = registry[name]
    stacks = _stacks(name) if wrapper else {}
    made = _made(name) if not wrapper else next((stack for _, stack in stacks.values()), None)
    known: Any = made if made is not None else factory
    options = _options(factory)
    defaults = {option: row["default"] if not row["required"] else option.upper() for option, row in options.items()}
    spec: Any = {name: defaults} if options else name
    told = {
        **_head(registry, name),
        "kind": registry.kind,
        "text": _text(factory),
        "equation": getattr(known, "equation", ""),
        "source": getattr(known, "source", ""),
        "traits": _changed_traits(stacks) if wrapper else _traits(known),
        "traffic": _traffic(getattr(known, "traffic", Traffic())),
        "options": options,
        "configuration": _yaml([spec, next(iter(stacks), "flexlora")] if wrapper else spec),
    }
    if wrapper:
        told["over"] = list(stacks)
        told["traffic"]["rule"] = next(iter(stacks), None)
    return told


def print_description(told: Mapping[str, Any]) -> None:
    """A page of text."""
    blocks = [f"{told['name']}, a {told['kind']} ({told['from']})", told["text"]]
    facts = {"equation": told["equation"], "source": told["source"]}
    if "over" in told:
        facts["over"] = _rules_in_words(told["over"])
    facts["in a configuration"] = told["configuration"]
    width = max(map(len, facts))
    blocks.append("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items() if value))
    head = "traits (inner: as the rule it wraps)" if "over" in told else "traits"
    blocks.append("\n".join([head, *(f"  {told['traits'][t]:<6} {w:<14} {m}" for t, (w, m) in TRAITS.items())]))
    blocks.append(_traffic_in_words(told["traffic"]))
    options = [
        f"  {option} {'(required)' if row['required'] else '= ' + repr(row['default'])}  {row['meaning']}".rstrip()
        for option, row in told["options"].items()
    ]
    blocks.append("\n".join(["options", *(options or ["  none"])]))
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    console.print(escape("\n\n".join(block for block in blocks if block)))


def required_options(factory: Callable[..., Any]) -> list[str]:
    """Options of a rule or wrapper that have no default."""
    return [name for name, row in _options(factory).items() if row["required"]]


def _head(registry: Registry[Any], name: str) -> dict[str, Any]:
    module = registry.origin(name)
    built_in = module.split(".")[0] == "fedlora"
    where = "built in" if built_in else getattr(sys.modules.get(module), "__file__", None) or module
    text = _text(registry[name])
    return {"name": name, "description": " ".join(text.split("\n\n")[0].split()), "from": where}


def _made(name: str) -> Strategy | None:
    """The rule with its default options; None where it cannot be made so."""
    try:
        return STRATEGIES.create(name)
    except Exception:  # noqa: BLE001 - a plug-in may raise anything
        return None


def _stacks(name: str) -> dict[str, tuple[Strategy, Strategy]]:
    """Every rule that a wrapper accepts, and the wrapper over it; the usual rules first."""
    # names of clients and the like, which nothing is done with here
    options = dict.fromkeys(required_options(WRAPPERS[name]), "ada")
    found: dict[str, tuple[Strategy, Strategy]] = {}
    for rule in sorted(STRATEGIES, key=lambda rule: (rule not in ("flexlora", "zero_pad"), rule)):
        inner = _made(rule)
        try:
            if inner is not None:
                found[rule] = inner, WRAPPERS.create(name, inner=inner, **options)
        except Exception:  # noqa: BLE001 - a plug-in may raise anything
            continue
    return found


def _traits(strategy: Any) -> dict[str, str]:
    traits = getattr(strategy, "traits", None)
    return {trait: "yes" if getattr(traits, trait, False) else "no" for trait in TRAITS}


def _changed_traits(stacks: Mapping[str, tuple[Strategy, Strategy]]) -> dict[str, str]:
    """What a wrapper makes of each trait: yes, no, or what the rule inside says."""
    told = {}
    for trait in TRAITS:
        pairs = [(getattr(inner.traits, trait), getattr(stack.traits, trait)) for inner, stack in stacks.values()]
        outcomes = {after for _, after in pairs}
        passed_on = len(outcomes) != 1 or all(before == after for before, after in pairs)
        told[trait] = "inner" if passed_on else "yes" if True in outcomes else "no"
    return told


def _traffic(traffic: Traffic) -> dict[str, Any]:
    """The formulas, and what they come to per module in the worked example."""
    told: dict[str, Any] = {"dense": traffic.dense}
    for name in TRAVELS:
        formula = getattr(traffic, name)
        numbers = traffic.count(formula, [(SIDE, SIDE)], RANK, RANK, [RANK] * CLIENTS, round=1)
        told[name] = {"formula": formula, "numbers": numbers, "bytes": 4 * numbers}
    return told


def _traffic_in_words(told: Mapping[str, Any]) -> str:
    over = f" over {told['rule']}" if told.get("rule") else ""
    lines = [
        f"traffic{over}, numbers per module [m, n] and client; m = n = {SIDE}, rank r = g = {RANK}, K = {CLIENTS}"
        f" clients, R = {RANK * CLIENTS}"
    ]
    rows = [name for name in TRAVELS if name in ("up", "down") or told[name]["formula"] != "0"]
    width = max(len(told[name]["formula"]) for name in rows)
    for name in rows:
        row = told[name]
        size = f"{row['numbers']:,} = {human_bytes(row['bytes'])} in float32"
        lines.append(f"  {name:<8}{row['formula']:<{width}}  {size}, {TRAVELS[name]}")
    if any("odd" in told[name]["formula"] for name in rows):
        lines.append("  odd is 1 in odd rounds, 0 in even ones; the numbers are those of an odd round")
    if any("first" in told[name]["formula"] for name in rows):
        lines.append("  first is 1 in the first round and after a freeze, 0 in others; the numbers are those of 1")
    if not told["dense"]:
        lines.append("  tensors trained in full, such as a head, do not travel up")
    return "\n".join(lines)


def _options(factory: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Default and meaning of every option; the meaning comes from the docstring that lists it."""
    found = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if name == "inner" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        found[name] = {
            "required": required,
            "default": default if isinstance(default, str | int | float | None) else str(default),
            "meaning": next((texts[name] for texts in _documented(factory) if name in texts), ""),
        }
    return found


def _documented(factory: Callable[..., Any]) -> Iterator[dict[str, str]]:
    """The ``Args`` of a class and of those it comes from."""
    for one in getattr(factory, "__mro__", (factory,)):
        _, _, block = inspect.cleandoc(one.__doc__ or "").partition("\nArgs:\n")
        block = block.replace("``", "")
        block = re.split(r"\n(?=\S)", block)[0]
        parts = re.split(r"(?m)^    (\w+): ", block)
        yield {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _text(factory: Callable[..., Any]) -> str:
    """The docstring without its sections."""
    return re.split(r"\n\n\w+:\n", inspect.cleandoc(factory.__doc__ or ""))[0].replace("``", "")


def _yaml(spec: Any) -> str:
    return yaml.safe_dump({"strategy": spec}, default_flow_style=True, width=1000, sort_keys=False).strip()[1:-1]


def _line(row: Mapping[str, Any]) -> str:
    return escape(row["description"] + ("" if row["from"] == "built in" else f" ({row['from']})"))


def _rules_in_words(over: Sequence[str]) -> str:
    """A short name for the rules that a wrapper accepts."""
    made = {rule: strategy for rule in STRATEGIES if (strategy := _made(rule))}
    for words, wanted in (
        ("any rule", lambda traits: True),
        ("rules with a fixed basis", lambda traits: traits.fixed_gauge),
        ("rules that use the given weights", lambda traits: traits.weighted),
    ):
        if set(over) == {rule for rule, strategy in made.items() if wanted(strategy.traits)}:
            return words
    missing = sorted(made.keys() - set(over))
    return f"any rule but {', '.join(missing)}" if len(missing) < len(over) else ", ".join(over) or "no rule"
