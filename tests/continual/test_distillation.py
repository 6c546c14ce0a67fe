"""Learning without forgetting: the frozen model's answers are what the client is held to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.config import RunConfig
from fedlora.continual.distillation import LwF
from fedlora.training.batches import collate
from fedlora.training.methods import Local, Memory, Start
from fedlora.training.objective import targets_and_logits
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from tests.conftest import quiet

DONE = {"some.module": LowRank(torch.ones(2, 1), torch.ones(1, 2))}  # something was frozen; what, is in the base


def begun(method: LwF, local: Local) -> Memory:
    """After a freeze whose head is the present one."""
    head = {name[1:]: p.detach().clone() for name, p in local.parameters.items() if name.startswith(":")}
    return method.begin(Start({}, frozenset(), frozenset(), frozen=lambda: AdapterState(DONE, head), local=local))


def look(local: Local) -> tuple[dict[str, Tensor], Tensor]:
    batch = collate(local.examples, local.pad_token_id, torch.device("cpu"))
    local.model.eval()
    return batch, targets_and_logits(local.model, batch)[0]


def silence(local: Local) -> None:
    """B = 0: the model as it was right after the freeze."""
    with torch.no_grad():
        for name, parameter in local.parameters.items():
            if name.endswith(":B"):
                parameter.zero_()


def test_a_model_that_has_not_moved_agrees_with_its_teacher(local: Local) -> None:
    method = LwF(weight=1.0, temperature=2.0)
    silence(local)
    batch, logits = look(local)
    value = method.distil(batch, logits, begun(method, local))
    assert value is not None
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)


def test_the_distance_is_the_divergence_over_earlier_labels(local: Local) -> None:
    local = replace(local, earlier=(0, 2))
    method = LwF(weight=3.0, temperature=2.0)
    batch, said = look(local)
    memory = begun(method, local)
    value = method.distil(batch, said, memory)
    assert value is not None
    value.backward()  # the teacher's turn leaves the client's graph whole
    assert any(p.grad is not None and p.grad.any() for p in local.parameters.values())
    silence(local)
    _, told = look(local)
    teacher = (told[:, [0, 2]] / 2).softmax(1)
    expected = 3.0 * 4.0 * (teacher * (teacher.log() - (said[:, [0, 2]] / 2).log_softmax(1))).sum()
    assert torch.isclose(value, expected, rtol=1e-4)


def test_the_teacher_leaves_the_client_as_it_was(local: Local) -> None:
    method = LwF(weight=1.0, temperature=2.0)
    batch, said = look(local)
    before = {name: parameter.detach().clone() for name, parameter in local.parameters.items()}
    method.distil(batch, said, begun(method, local))
    assert all(torch.equal(parameter, before[name]) for name, parameter in local.parameters.items())


def test_a_client_without_a_past_is_taught_nothing(local: Local) -> None:
    local = replace(local, earlier=())
    method = LwF(weight=1.0, temperature=2.0)
    batch, said = look(local)
    assert method.distil(batch, said, begun(method, local)) is None


def test_before_the_first_freeze_there_is_no_teacher(local: Local) -> None:
    method = LwF(weight=1.0, temperature=2.0)
    memory = method.begin(Start({}, frozenset(), frozenset(), local=local))
    assert method.distil({}, torch.zeros(1, 2), memory) is None


def test_a_stream_distils_what_the_ledger_remembers_of_the_head(toy: Callable[..., RunConfig]) -> None:
    stream: dict[str, Any] = {"continual": {"split": 2, "rounds": 1}, "rounds": 2}
    config = toy(strategy=[{"lwf": {"weight": 1.0}}, "flexlora"], **stream)
    launch.run(config, quiet)
    state, _ = load_latest(Path(config.output_dir))
    assert state is not None
    (entry,) = state.ledger.entries
    assert entry.kind == "merge"
    assert set(state.adapter.dense) == {"classifier.bias", "classifier.weight"}
