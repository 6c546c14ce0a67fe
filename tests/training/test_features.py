"""Features of the bare base: the same whatever adapter is on it, of the question only, and matched by direction."""

import pytest
import torch

from fedlora.adapter.initial import initial_adapter
from fedlora.adapter.peft import insert
from fedlora.adapter.state import LowRank
from fedlora.data.text import IGNORE, Example
from fedlora.training.features import features, nearest
from fedlora.training.model import AdaptedModel, AdapterSpec, BaseSpec, load_base

CPU = torch.device("cpu")
TARGETS = {"builtin:tiny-bert": ("query", "value"), "builtin:tiny-llama": ("q_proj", "v_proj")}


def adapted(name: str) -> AdaptedModel:
    task = "sequence-classification" if "bert" in name else "causal-lm"
    labels = ("a", "b") if "bert" in name else ()
    return AdaptedModel(load_base(BaseSpec(name, task, labels)), AdapterSpec(TARGETS[name], 2.0))


def rows(lengths: list[int], answers: bool = False) -> list[Example]:
    made = []
    for number, length in enumerate(lengths):
        ids = [5 + (7 * number + 3 * place) % 40 for place in range(length)]
        made.append(Example(ids, [IGNORE] * (length - 2) + ids[-2:] if answers else 0))
    return made


@pytest.mark.parametrize("name", TARGETS)
def test_features_are_of_the_base_and_the_adapter_is_back_afterwards(name: str) -> None:
    whole = adapted(name)
    info = whole.info()
    model = whole.at_rank(2)
    before = features(model, rows([4, 9, 6]), 2, 0, CPU)
    state = initial_adapter(info.sites, info.dense, 2, seed=0)
    insert(model, "r2", state.map(lambda update: LowRank(torch.ones_like(update.B), update.A)))
    ids = torch.tensor([rows([4])[0].input_ids])
    with torch.no_grad():
        seen = model(input_ids=ids).logits
        assert torch.equal(features(model, rows([4, 9, 6]), 2, 0, CPU), before)
        assert torch.equal(model(input_ids=ids).logits, seen)


def test_features_of_a_row_do_not_depend_on_its_batch() -> None:
    model = adapted("builtin:tiny-bert").at_rank(2)
    together = features(model, rows([4, 9, 6]), 3, 0, CPU)
    alone = torch.cat([features(model, [row], 1, 0, CPU) for row in rows([4, 9, 6])])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_language_model_is_asked_without_the_answer() -> None:
    model = adapted("builtin:tiny-llama").at_rank(2)
    (row,) = rows([9], answers=True)
    other = Example([*row.input_ids[:-2], 6, 7], row.labels)
    assert torch.allclose(features(model, [row], 1, 0, CPU), features(model, [other], 1, 0, CPU), atol=1e-6)


def test_rows_go_where_the_cosine_is_largest_and_to_the_first_of_two() -> None:
    found = nearest(torch.tensor([[1.0, 0.1], [0.1, 9.0], [1.0, 1.0]]), [(5.0, 0.0), (0.0, 0.1)])
    assert found.tolist() == [0, 1, 0]
    assert nearest(torch.empty(0, 2), [(5.0, 0.0)]).tolist() == []
