"""What hostile clients do instead of their part: a simulation tool, to see what a rule stands up to.

An attack changes an attacker's examples before it trains, or its delta before it is sent. Both hooks are plain
functions of what they are given and of a ``Scene``, so a plug-in file may register its own::

    @ATTACKS.register("silence")
    class Silence(Attack):
        def delta(self, delta, scene):
            return {name: torch.zeros_like(tensor) for name, tensor in delta.items()}

Attacks change what travels as the delta; a strategy's extra tensors (SCAFFOLD's control variates) stay honest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import cast

import torch
from torch import Tensor

from fedlora.config import AttackConfig
from fedlora.data.text import Example
from fedlora.errors import ConfigError, nearest
from fedlora.protocol import TrainTask
from fedlora.registry import Registry
from fedlora.seeds import derive_seed

Delta = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """What an attacker knows when it acts.

    Attributes:
        round: 1-based.
        client: the attacker whose turn it is.
        seed: its own, another one in every round.
        group_seed: the same for all attackers in all rounds.
        classes: size of the label set; 0 for a language model.
        group: all attackers, this one included.
        honest: returns the deltas that the group would have sent honestly; whoever cannot train is missing. Each
            is trained from what this attacker received, at its rank, so that shapes agree at mixed ranks too.
    """

    round: int
    client: str
    seed: int
    group_seed: int
    classes: int
    clients: int
    group: tuple[str, ...]
    honest: Callable[[], Sequence[Delta]]


class Attack:
    """Does no harm. A subclass takes plain options, and says what it changes.

    Attributes:
        trains: whether attackers train at all. One that does not starts ``delta`` from (almost) zeros.
        colludes: whether ``delta`` asks for ``scene.honest``; what was trained for it is then kept for the round.
    """

    trains = True
    colludes = False

    def check(self, classes: int, clients: int, attackers: int) -> None:
        """Raise ``ConfigError`` where the attack cannot be mounted on this federation."""

    def examples(self, examples: Sequence[Example], scene: Scene) -> Sequence[Example]:
        """What the attacker trains on. Must not change its argument. Default: its own rows."""
        return examples

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        """What the attacker sends, given what it learned. Must not change its argument. Default: just that."""
        return delta


ATTACKS: Registry[Attack] = Registry("attack")


@ATTACKS.register("label_flip")
class LabelFlip(Attack):
    """Train on wrong labels: y becomes (y + shift) mod classes.

    Source: Biggio et al., 2012 (arXiv 1206.6389); for federated learning Tolpegin et al., 2020 (arXiv 2007.08432).

    Args:
        shift: None draws one ring through all labels for the whole group, and each becomes the next on it.
    """

    def __init__(self, shift: int | None = 1):
        if shift is not None and (isinstance(shift, bool) or not isinstance(shift, int)):
            raise ConfigError(f"attack: label_flip.shift is a whole number or null, not {shift!r}")
        self.shift = shift

    def check(self, classes: int, clients: int, attackers: int) -> None:
        if not classes:
            raise ConfigError(
                "attack: label_flip needs class labels, and these rows have none; use sign_flip or scaled_update"
            )
        if self.shift is not None and self.shift % classes == 0:
            raise ConfigError(f"attack: label_flip with shift {self.shift} leaves all {classes} labels as they are")

    def examples(self, examples: Sequence[Example], scene: Scene) -> Sequence[Example]:
        wrong = self._mapping(scene)
        # one index per row: check() has refused everything else
        return [replace(example, labels=wrong[cast(int, example.labels)]) for example in examples]

    def _mapping(self, scene: Scene) -> dict[int, int]:
        if self.shift is not None:
            return {label: (label + self.shift) % scene.classes for label in range(scene.classes)}
        ring = random.Random(scene.group_seed).sample(range(scene.classes), scene.classes)
        return dict(zip(ring, [*ring[1:], ring[0]], strict=True))


@ATTACKS.register("sign_flip")
class SignFlip(Attack):
    """Send ``-scale`` times the honest delta.

    Source: Li et al., 2019 (RSA, arXiv 1811.03761).
    """

    def __init__(self, scale: float = 1.0):
        _require(0 < scale < math.inf, "sign_flip.scale is a positive number", scale)
        self.scale = scale

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        return {name: -self.scale * tensor for name, tensor in delta.items()}


@ATTACKS.register("scaled_update")
class ScaledUpdate(Attack):
    """Send ``factor`` times the honest delta, to outweigh everyone else.

    Source: the boosting of Bhagoji et al., 2019 (arXiv 1811.12470) and Bagdasaryan et al., 2020 (arXiv 1807.00459).
    """

    def __init__(self, factor: float = 10.0):
        _require(0 < abs(factor) < math.inf, "scaled_update.factor is a number other than 0", factor)
        self.factor = factor

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        return {name: self.factor * tensor for name, tensor in delta.items()}


@ATTACKS.register("gaussian")
class Gaussian(Attack):
    """Send noise.

    Source: Blanchard et al., 2017 (arXiv 1703.02757), section 6.

    Args:
        std: of every coordinate. None gives the whole delta ``factor`` times the norm of the honest one.
        factor: only where ``std`` is None.
    """

    def __init__(self, std: float | None = None, factor: float = 1.0):
        _require(std is None or 0 < std < math.inf, "gaussian.std is a positive number or null", std)
        _require(0 < factor < math.inf, "gaussian.factor is a positive number", factor)
        self.std, self.factor = std, factor

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        noise = _noise(delta, scene.seed)
        size = self.std if self.std is not None else self.factor * _norm(delta) / max(_norm(noise), 1e-30)
        return {name: size * tensor for name, tensor in noise.items()}


@ATTACKS.register("nan")
class NotANumber(Attack):
    """Send the honest delta with NaN at one coordinate of every tensor, or everywhere."""

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        if self.everywhere:
            return {name: torch.full_like(tensor, math.nan) for name, tensor in delta.items()}
        draw = random.Random(scene.seed)
        spoilt = {name: tensor.clone() for name, tensor in delta.items()}
        for _, tensor in sorted(spoilt.items()):
            if tensor.numel():
                tensor.view(-1)[draw.randrange(tensor.numel())] = math.nan
        return spoilt


@ATTACKS.register("alie")
class ALittleIsEnough(Attack):
    """Collude: every attacker sends ``mean - z std`` of what the group learned honestly, coordinate by coordinate.

    Too close to the others to be told apart, and all to one side. The group knows its own updates only.

    Source: Baruch et al., 2019 (arXiv 1902.06156), algorithm 3. There, z is the largest one with
    ``Phi(z) < (n - f - s) / (n - f)``, ``s = floor(n / 2 + 1) - f``: so many honest clients lie further out than
    the attackers that these pass for the majority. Of n clients, f attack.

    Args:
        z: None takes the paper's from n and f; it is 0 where f is too small for any.
    """

    colludes = True

    def __init__(self, z: float | None = None):
        _require(z is None or abs(z) < math.inf, "alie.z is a number or null", z)
        self.z = z

    def check(self, classes: int, clients: int, attackers: int) -> None:
        if self.z is None and not supporters(clients, attackers) > 0:
            raise ConfigError(
                f"attack: {attackers} of {clients} clients are a majority, for which alie knows no z; give options.z"
            )

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        z = largest_z(scene.clients, len(scene.group)) if self.z is None else self.z
        honest = scene.honest()
        sent = {}
        for name in delta:
            learned = torch.stack([other[name] for other in honest])
            sent[name] = learned.mean(dim=0) - z * learned.std(dim=0, correction=0)
        return sent


@ATTACKS.register("free_rider")
class FreeRider(Attack):
    """Do not train: send nothing new, under the numbers an honest client would report.

    Source: Lin et al., 2019 (arXiv 1911.12560); the noise is Fraboni et al.'s, 2021 (arXiv 2006.11901).

    Args:
        noise: standard deviation of what is sent in place of zeros.
    """

    trains = False

    def __init__(self, noise: float = 0.0):
        _require(0 <= noise < math.inf, "free_rider.noise is a number of at least 0", noise)
        self.noise = noise

    def delta(self, delta: Delta, scene: Scene) -> Delta:
        return {name: self.noise * tensor for name, tensor in _noise(delta, scene.seed).items()}


def supporters(clients: int, attackers: int) -> int:
    """How many honest clients the attackers need on their side to be a majority: s of Baruch et al."""
    return clients // 2 + 1 - attackers


def largest_z(clients: int, attackers: int) -> float:
    """Baruch et al.'s z, at least 0."""
    honest = clients - attackers
    return max(0.0, NormalDist().inv_cdf((honest - supporters(clients, attackers)) / honest))


# Mounting an attack on a federation --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Assault:
    """An attack and who carries it out.

    Attributes:
        name: of the attack, as registered.
        group: the attackers, in the order of the federation.
        classes, clients: size of the label set, and of the federation.
        seed: the run's root seed.
    """

    name: str
    attack: Attack
    group: tuple[str, ...]
    classes: int
    clients: int
    seed: int

    def scene(self, task: TrainTask, honest: Callable[[], Sequence[Delta]]) -> Scene:
        """What the attacker of this task knows."""
        return Scene(
            round=task.round,
            client=task.client,
            seed=derive_seed(self.seed, task.round, task.client, "attack"),
            group_seed=derive_seed(self.seed, 0, "", "attack"),
            classes=self.classes,
            clients=self.clients,
            group=self.group,
            honest=honest,
        )

    def task_of(self, client: str, task: TrainTask) -> TrainTask:
        """What ``client`` would do in the place of this task's client: its own rows and batches, the same start."""
        return replace(task, client=client, seed=derive_seed(self.seed, task.round, client, "train"))


def mount(settings: AttackConfig | None, clients: Sequence[str], classes: int, seed: int) -> Assault | None:
    """The attack a run asks for; None for a run without one.

    Args:
        clients: ids of everyone registered.
        classes: size of the label set; 0 for a language model.
        seed: the run's root seed.

    Raises:
        ConfigError: unknown names, options or clients, or an attack that does not fit this federation.
    """
    if settings is None:
        return None
    attack = build(settings)
    group = choose(settings.clients, clients, seed)
    attack.check(classes, len(clients), len(group))
    return Assault(settings.name, attack, group, classes, len(clients), seed)


def build(settings: AttackConfig) -> Attack:
    """The attack alone, which needs no data: enough to refuse a misspelt name.

    Raises:
        ConfigError: for an unknown name or options the attack does not take.
    """
    return ATTACKS.create(settings.name, **settings.options)


def choose(who: float | Sequence[str], clients: Sequence[str], seed: int) -> tuple[str, ...]:
    """The attackers, in the order of ``clients``: those named, or a seeded share of the federation, at least one.

    The attackers of a smaller share are among those of a larger one.

    Raises:
        ConfigError: for a client that is not registered.
    """
    if isinstance(who, float | int):
        order = random.Random(derive_seed(seed, 0, "", "attackers")).sample(list(clients), len(clients))
        chosen = set(order[: max(1, round(who * len(clients)))])
    else:
        for client in who:
            if client not in clients:
                raise ConfigError(f"attack.clients: {client} is not registered{nearest(client, clients)}")
        chosen = set(who)
    return tuple(client for client in clients if client in chosen)


def _noise(like: Delta, seed: int) -> dict[str, Tensor]:
    """Standard normal numbers in these shapes."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in sorted(like.items())}


def _norm(delta: Delta) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))


def _require(holds: bool, what: str, came: object) -> None:
    if not holds:
        raise ConfigError(f"attack: {what}, not {came!r}")
