"""One client's bounded unlearning: rows become unlikely, the others stay, and the change stays in a ball.

What is minimised is ``forget loss + retain_weight * loss on the retain rows``, over parameters x with
``||x - start|| <= max_norm``. The level is A: evidence only, for verification to look at; the rows are not erased.
A client that has nothing to retain is held back by the ball alone, as in the projected ascent of Halimi et al. (2022,
arXiv 2207.05521) - whose ball is around the mean of the other clients' models, and ours around what was received.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

from fedlora.adapter.peft import inspecting
from fedlora.config import TrainingConfig
from fedlora.data.text import IGNORE, Example
from fedlora.errors import DataError, FedLoRAError
from fedlora.protocol import EvalResult, Method
from fedlora.seeds import derive_seed
from fedlora.training.batches import batch_indices, collate
from fedlora.training.evaluate import evaluate
from fedlora.training.loop import LocalResult, LocalWork, train
from fedlora.training.methods import Local, LocalMethod, Memory, MethodStack, Start, Tensors
from fedlora.training.objective import among, targets_and_logits
from fedlora.unlearning.forget_losses import FORGET_LOSSES, ForgetLoss
from fedlora.unlearning.recipe import Recipe


@dataclass(frozen=True, eq=False)
class ForgetWork:
    """What one client is to forget.

    Attributes:
        model: as it was received, which is the reference. Only ``parameters`` may need gradients.
        parameters: what is changed, by tensor name.
        forget: at least one row.
        retain: rows of the same kind: what must go on working.
        recipe: how.
        seed: of the order of rows, and dropout on the retain rows.
        pad_token_id: of the tokenizer.
        scaling: ``scaling * B`` is B in effective units.
        labels: indices of the labels that compete in a classifier's loss; all where empty.
        methods: of a plan, which act as in training.
        alone: whether there may be no retain rows. Others' rows then have to mend what the change broke.
    """

    model: Any
    parameters: Mapping[str, nn.Parameter]
    forget: Sequence[Example]
    retain: Sequence[Example]
    recipe: Recipe
    seed: int
    pad_token_id: int
    scaling: float = 1.0
    labels: tuple[int, ...] = ()
    methods: tuple[Method, ...] = ()
    alone: bool = False


@dataclass(frozen=True, eq=False)
class Forgotten:
    """What unlearning did.

    Attributes:
        forget_before, forget_after: scores on the forget rows.
        retain_before, retain_after: scores on the retain rows; of nothing where there are none.
        steps: of the optimizer.
        held_steps: after which the change had to be cut back to ``max_norm``.
        change: norm of the change, effective units.
        shared_rows: forget rows that are among the retain rows as well, which pull both ways.
        trained: what the training loop reports; its rows, tokens and losses are those of the retain rows, or of the
            forget rows where there are none.
    """

    forget_before: EvalResult
    forget_after: EvalResult
    retain_before: EvalResult
    retain_after: EvalResult
    steps: int
    held_steps: int
    change: float
    shared_rows: int
    trained: LocalResult

    @property
    def bounded(self) -> bool:
        """Whether the bound held it back at any step."""
        return self.held_steps > 0

    def metrics(self) -> dict[str, float]:
        """Plain numbers for a log: losses and accuracies before and after, and the rest by its name."""
        found: dict[str, float] = {}
        for kind in ("forget", "retain") if self.retain_before.num_examples else ("forget",):
            for when in ("before", "after"):
                score: EvalResult = getattr(self, f"{kind}_{when}")
                found |= {f"{kind}_loss_{when}": score.loss, f"{kind}_accuracy_{when}": score.accuracy}
        counts = {"steps": self.steps, "held_steps": self.held_steps, "shared_rows": self.shared_rows}
        return {**found, **counts, "change": self.change}


def unlearn(work: ForgetWork) -> Forgotten:
    """Change ``work.parameters`` in place so that the forget rows become unlikely.

    Equal work gives equal bytes on equal hardware. The model is left in evaluation mode.

    Raises:
        DataError: no forget rows or no retain rows (but see ``alone``), rows of two kinds, rows that cannot be
            forgotten, or nothing to forget that is not to be retained.
        ConfigError: an unknown loss, or options it does not take.
        FedLoRAError: if a loss stops being a number, or a loss of a plug-in has another shape.
    """
    shared = _check(work)
    recipe = work.recipe
    examples = work.retain or work.forget  # without retain rows the loss of these has the weight 0
    local = Local(work.model, work.parameters, examples, work.pad_token_id, work.labels, seed=work.seed)
    own = {name: parameter.detach().clone() for name, parameter in work.parameters.items()}
    forgetting = Forgetting(work.forget, recipe, recipe.retain_weight if work.retain else 0.0)
    stack = MethodStack(work.methods, also={"forget": forgetting})
    memory = stack.begin(Start(own, frozenset(own), frozenset(), work.scaling, local=local))
    options = TrainingConfig(
        learning_rate=recipe.learning_rate,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        base_dropout=False,  # what is compared with the reference should differ from it by what was learned
    )
    forget_before, retain_before = _score(work, work.forget), _score(work, work.retain)
    trained = train(
        LocalWork(
            work.model, work.parameters, examples, options, work.seed, work.pad_token_id, stack, memory, work.labels
        )
    )
    after: Memory = trained.memory["forget"]
    tensors = {name: parameter.detach() for name, parameter in work.parameters.items()}
    found = Forgotten(
        forget_before,
        _score(work, work.forget),
        retain_before,
        _score(work, work.retain),
        trained.steps,
        after["held"],
        _distance(tensors, after),
        shared,
        trained,
    )
    # a step that breaks the model is seen by the next one, and the last has none
    kind, score = ("retain", found.retain_after) if work.retain else ("forget", found.forget_after)
    if not math.isfinite(found.change) or not math.isfinite(score.loss):
        raise FedLoRAError(
            f"unlearning: after {trained.steps} steps the loss on the {kind} rows is {score.loss};"
            " lower learning_rate or max_norm"
        )
    return found


class Forgetting(LocalMethod):
    """Adds a forget loss to training on the retain rows, and keeps the parameters in a ball around the start.

    Its rows are read without dropout, as for the reference: the ratio of the two begins at exactly 1.

    Args:
        rows: to be forgotten.
        recipe: steps and learning rate are those of the loop that this is part of.
        data_weight: of the loss on the rows that the loop trains on; default the recipe's ``retain_weight``.
    """

    def __init__(self, rows: Sequence[Example], recipe: Recipe, data_weight: float | None = None):
        self.rows, self.recipe = rows, recipe
        self.data_weight = recipe.retain_weight if data_weight is None else data_weight
        self.loss: ForgetLoss = FORGET_LOSSES.create(recipe.loss, **recipe.options)

    def begin(self, start: Start) -> Memory:
        if start.local is None:
            raise FedLoRAError("unlearning: looks at the model, and was given none")
        return {
            "local": start.local,
            "reference": self._reference(start.local),
            "start": {name: start.tensors[name] for name in sorted(start.trained)},
            "units": {name: start.unit(name) for name in start.trained},
            "step": 0,
            "held": 0,
        }

    def distil(self, batch: Tensors, logits: Tensor, memory: Memory) -> Tensor | None:
        local: Local = memory["local"]
        places = self._places(memory["step"], local.seed)
        with inspecting(local.model):
            logp, lengths = log_likelihoods(local, [self.rows[place] for place in places])
        losses = self.loss.loss(logp, memory["reference"][places], lengths)
        if losses.shape != logp.shape:
            came, name = list(losses.shape), self.recipe.loss
            raise FedLoRAError(f"forget loss: {name} returned {came}; expected one number per row, [{len(places)}]")
        value = losses.mean()
        if not value.isfinite():
            raise FedLoRAError(
                f"forget loss: {self.recipe.loss} became {value.item()} at step {memory['step'] + 1};"
                " lower learning_rate or max_norm"
            )
        return value * len(logits)  # the loop divides by the targets of its batch

    def constrain(self, tensors: Tensors, memory: Memory) -> tuple[Tensors, Memory]:
        memory = {**memory, "step": memory["step"] + 1}
        size, limit = _distance(tensors, memory), self.recipe.max_norm
        if size <= limit:
            return {}, memory
        # radial in effective units, and linear in any: the nearest point of the ball
        start = memory["start"]
        moved = {name: first + limit / size * (tensors[name] - first) for name, first in start.items()}
        return moved, {**memory, "held": memory["held"] + 1}

    @torch.no_grad()
    def _reference(self, local: Local) -> Tensor:
        """Log-likelihood of every row [n] under the model as it is."""
        found = torch.zeros(len(self.rows), device=_device(local))
        order = sorted(range(len(self.rows)), key=lambda row: len(self.rows[row].input_ids))
        with inspecting(local.model):
            for begin in range(0, len(order), self.recipe.batch_size):
                places = order[begin : begin + self.recipe.batch_size]
                found[places] = log_likelihoods(local, [self.rows[place] for place in places])[0]
        return found

    def _places(self, step: int, seed: int) -> list[int]:
        """The rows of a step: every row once, then all again in another order."""
        size = self.recipe.batch_size
        epoch, place = divmod(step, math.ceil(len(self.rows) / size))
        order = derive_seed(seed, epoch, "", "forget batches")
        return list(batch_indices([len(row.input_ids) for row in self.rows], size, order, True))[place]


def log_likelihoods(local: Local, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Of rows in one batch: the sum of the log-probabilities of a row's targets [n], and how many they are [n]."""
    logits, targets, places = targets_and_logits(local.model, collate(rows, local.pad_token_id, _device(local)))
    losses = cross_entropy(among(logits, local.labels), targets, reduction="none")
    logp = losses.new_zeros(len(rows)).index_add(0, places, -losses)
    return logp, torch.bincount(places, minlength=len(rows))


def _distance(tensors: Tensors, memory: Memory) -> float:
    """Norm of the change so far, in effective units."""
    start, units = memory["start"], memory["units"]
    norms = [vector_norm((units[name] * (tensors[name] - first)).double()) for name, first in start.items()]
    return float(vector_norm(torch.stack(norms)))


def _device(local: Local) -> torch.device:
    return next(iter(local.parameters.values())).device


def _score(work: ForgetWork, rows: Sequence[Example]) -> EvalResult:
    if not rows:
        return EvalResult("", 0.0, 0, 0, 0)
    device = next(iter(work.parameters.values())).device
    return evaluate(work.model, rows, work.recipe.batch_size, work.pad_token_id, device, labels=work.labels)


def _check(work: ForgetWork) -> int:
    """Raise ``DataError`` for rows that cannot be worked on; else how many forget rows are retain rows too."""
    if not work.forget:
        raise DataError("unlearning: there are no rows to forget")
    if not work.retain and not work.alone:
        raise DataError(
            "unlearning: there are no retain rows, and without them forgetting takes the rest of the model with it;"
            " give rows that must go on working"
        )
    kinds = {isinstance(row.labels, int) for row in (*work.forget, *work.retain)}
    if len(kinds) > 1:
        raise DataError("unlearning: some rows have one label and others a label per token; give rows of one kind")
    for kind, rows in (("forget", work.forget), ("retain", work.retain)):
        for number, row in enumerate(rows):
            if isinstance(row.labels, int):
                if work.labels and row.labels not in work.labels:
                    known = ", ".join(map(str, sorted(work.labels)))
                    raise DataError(
                        f"unlearning: {kind} row {number} has label {row.labels}, which does not compete ({known} do)"
                    )
            elif all(label == IGNORE for label in row.labels[1:]):
                raise DataError(f"unlearning: {kind} row {number} has no target token")
    kept = {_key(row) for row in work.retain}
    shared = sum(_key(row) in kept for row in work.forget)
    if shared == len(work.forget):
        raise DataError(f"unlearning: all {shared} forget rows are among the retain rows; take them out of those")
    return shared


def _key(row: Example) -> tuple[tuple[int, ...], int | tuple[int, ...]]:
    return tuple(row.input_ids), row.labels if isinstance(row.labels, int) else tuple(row.labels)
