"""MiniLM on BBC news: the real small model where it matters, in seconds."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from clients.specs import adapter_spec
from fedlora.adapter.peft import insert
from fedlora.config import load_config
from fedlora.training.model import AdaptedModel, BaseSpec, load_base
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.stores.files import read_json
from tests.conftest import quiet

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    changes = ["rounds=1", "training.max_steps=2", "data.max_length=16", "data.max_test_rows=40", "threads=1"]
    launch.run(load_config(QUICKSTART, [*changes, "evaluation.per_client=false", f"output_dir={folder}"]), quiet)
    return folder


def test_the_written_adapter_loads_with_peft_and_gives_the_runs_own_logits(short_run: Path) -> None:
    labels = tuple(read_json(short_run / "labels.json"))
    spec = BaseSpec("builtin:minilm", "sequence-classification", labels)
    state, _ = load_latest(short_run)
    assert state is not None
    config = load_config(short_run / "config.yaml")
    base = load_base(spec)
    own = AdaptedModel(base, adapter_spec(config)).at_rank(state.adapter.rank)
    insert(own, f"r{state.adapter.rank}", state.adapter)
    theirs = PeftModel.from_pretrained(load_base(spec).model, short_run / "adapter")
    rows = base.tokenizer(["The match ended in a draw.", "Shares fell on Friday."], return_tensors="pt", padding=True)
    with torch.no_grad():
        difference = (own.eval()(**rows).logits - theirs.eval()(**rows).logits).abs().max()
    assert difference < 1e-4


def test_clients_of_three_ranks_took_part(short_run: Path) -> None:
    ranks = {member["rank"] for member in read_json(short_run / "partition.json")}
    assert ranks == {4, 8, 16}
