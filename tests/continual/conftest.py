"""What the tests of local methods look through."""

from collections.abc import Callable

import pytest
import torch

from clients.runtime import ClientRuntime
from fedlora.adapter.peft import insert
from fedlora.adapter.state import AdapterState, LowRank
from fedlora.config import RunConfig
from fedlora.training.methods import Local, name_parameters


@pytest.fixture
def local(toy: Callable[..., RunConfig]) -> Local:
    """A client with three rows that looks at them through a random adapter of rank 4."""
    runtime = ClientRuntime(toy())
    base, adapted = runtime.base(), runtime._model()
    model = adapted.at_rank(4)
    draw = torch.Generator().manual_seed(0)
    pairs = {
        path: LowRank(torch.randn(out, 4, generator=draw) / 9, torch.randn(4, width, generator=draw))
        for path, (out, width) in base.sites.items()
    }
    insert(model, "r4", AdapterState(pairs, base.dense))
    parameters = name_parameters(model, "r4", frozenset({"A", "B", "dense"}))
    return Local(
        model, parameters, runtime.rows.examples("train", "c0").examples[:3], adapted.base.tokenizer.pad_token_id
    )
