"""The model of a run folder, measured on chosen rows: base, ledger and adapter as clients are served them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clients.specs import adapter_spec
from fedlora.adapter.peft import insert
from fedlora.adapter.rank import pad
from fedlora.config import TrainingConfig
from fedlora.errors import VerificationError
from fedlora.seeds import derive_seed
from fedlora.training.methods import name_parameters
from fedlora.training.model import AdaptedModel, Base, adapter_name
from fedlora.unlearning.measures import Measured, Scoring, Sets, measure, score_rows
from fedlora.unlearning.relearning import Lesson, Relearned, relearn
from orchestrator.artifacts import load, open_run

STEPS = 10  # of the control's lesson, at least: of fewer a difference of a quarter cannot be seen
MOST_STEPS = 40
HALVINGS = 10  # of the learning rate until the control needs that many


@dataclass(frozen=True, eq=False)
class Served:
    """The model of a run as it stands.

    Attributes:
        round: committed rounds.
        model: in memory, with the adapter active.
        parameters: of the adapter and of what is trained in full.
        training: settings of the run's own training.
    """

    round: int
    base: Base
    model: Any
    parameters: Mapping[str, nn.Parameter]
    training: TrainingConfig
    seed: int

    @property
    def scoring(self) -> Scoring:
        """How rows are run through it."""
        size, pad_token_id = self.training.per_device_eval_batch_size, self.base.tokenizer.pad_token_id
        return Scoring(size, pad_token_id, self.base.device)

    def look(self, sets: Sets, like: Relearned | None = None) -> Measured:
        """Measure it, with the lesson that another model had, or with none."""
        if like is None:
            return measure(self.model, sets, self.scoring)
        settings = (like.level, like.learning_rate, like.max_steps, like.batch_size, like.seed)
        return measure(self.model, sets, self.scoring, Lesson(self.parameters, *settings))


def serve(folder: Path) -> Served:
    """The model of a run folder; a model of its own on every call.

    Raises:
        RunFolderError: not a run folder, or nothing committed yet.
        ModelError: the base cannot be loaded.
    """
    run = open_run(folder)
    base = load(run)
    adapted = AdaptedModel(base, adapter_spec(run.config))
    state = run.state.adapter.map(lambda update: pad(update, run.state.adapter.rank))
    model, name = adapted.at_rank(state.rank), adapter_name(state.rank)
    adapted.patch_base(run.state.ledger.patches(), state.frozen)
    insert(model, name, state)
    parameters = name_parameters(model, name, frozenset({"A", "B", "C", "dense"}))
    return Served(run.state.round, base, model, parameters, run.config.training, run.config.seed)


def lesson_for(control: Served, sets: Sets, before: float) -> Relearned:
    """The lesson all models get: its level half way between the model before and the control, its rate such that the
    control takes many steps.

    Args:
        before: mean loss of the forget rows in the model that knows them, in nats.

    Returns:
        How it went with the control.

    Raises:
        VerificationError: if the model before knows no more of the rows than the control.
    """
    unseen = score_rows(control.model, sets.forget, control.scoring).loss
    if not before < unseen:
        raise VerificationError(
            f"power: the loss of the rows to forget is {before:.3g} nats in the run and {unseen:.3g} in a model that"
            " never saw them: they left no trace that can be seen, so passing would prove nothing"
        )
    level, rate = (before + unseen) / 2, control.training.learning_rate
    size, seed = control.training.per_device_train_batch_size, derive_seed(control.seed, 0, "", "lesson")
    for _ in range(HALVINGS):
        lesson = Lesson(control.parameters, level, rate, MOST_STEPS, size, seed)
        found = relearn(control.model, sets.forget, lesson, control.scoring.pad_token_id)
        if found.steps >= STEPS:
            break
        rate /= 2
    return found
