"""What can be done with a run afterwards: score it on other rows, take the adapter or a merged model out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from clients.specs import adapter_spec, base_spec
from fedlora.adapter.peft import insert
from fedlora.adapter.rank import pad
from fedlora.config import RunConfig
from fedlora.data.sources import normalise, quiet, read_file
from fedlora.data.text import Example, encode
from fedlora.errors import ConfigError, DataError, FedLoRAError, RunFolderError, nearest
from fedlora.protocol import EvalResult
from fedlora.training.batches import collate
from fedlora.training.evaluate import evaluate
from fedlora.training.model import AdaptedModel, Base, adapter_name, load_base, quiet_transformers
from fedlora.training.objective import targets_and_logits
from orchestrator.checkpoint import load_latest
from orchestrator.exports import note_export
from orchestrator.results import export_adapter, whole_adapter
from orchestrator.state import RunState
from orchestrator.stores.files import read_config, read_json, writing

TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Run:
    """A run as it stands on disk."""

    folder: Path
    config: RunConfig
    state: RunState
    labels: tuple[str, ...]

    @property
    def task(self) -> str:
        return "sequence-classification" if self.labels else "causal-lm"


def open_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunFolderError: not a run folder, or nothing committed yet.
    """
    config = read_config(folder)
    state, _ = load_latest(folder)
    if state is None:
        raise RunFolderError(f"{folder} has no committed round yet; fedlora resume {folder} goes on with it")
    return Run(folder, config, state, tuple(read_json(folder / "labels.json")))


def load(run: Run) -> Base:
    """The bare base of a run."""
    return load_base(base_spec(run.config, run.task, run.labels))


def with_adapter(run: Run, base: Base) -> Any:
    """The run's model: its ledger and its adapter on a base, which is changed for good."""
    adapter = whole_adapter(run.state)
    adapter = adapter.map(lambda update: pad(update, adapter.rank))
    model = AdaptedModel(base, adapter_spec(run.config)).at_rank(adapter.rank)
    insert(model, adapter_name(adapter.rank), adapter)
    return model


def score(run: Run, data: str) -> EvalResult:
    """Score the run's adapter on a file.

    Raises:
        DataError: a malformed file, rows of another form, or labels the run does not know.
    """
    with quiet():
        rows = normalise(read_file(data), run.config.data, data, run.task)
    if (rows.form == "classification") != bool(run.labels):
        expected = "text and label" if run.labels else "messages, prompt and completion, or text"
        raise DataError(f"data: {data} has {rows.form} rows; this run was trained on {expected}")
    for number, label in enumerate(rows.table["label"] if run.labels else []):
        if label not in run.labels:
            raise DataError(
                f"data: row {number} of {data} has the label {label!r}, which is not in the run's label set of"
                f" {len(run.labels)}{nearest(label, run.labels)}"
            )
    base = load(run)
    model = with_adapter(run, base)
    examples = encode(
        rows.table.to_list(), rows.form, base.tokenizer, run.config.data.max_length, run.labels, data
    ).examples
    size = run.config.training.per_device_eval_batch_size
    return evaluate(model, examples, size, base.tokenizer.pad_token_id, base.device)


@quiet_transformers()
def export(run: Run, target: Path, merge: bool) -> float:
    """Write a PEFT directory, or the merged model with its tokenizer, and prove it.

    The written files are loaded again and their logits compared with the run's own. The run folder remembers where it
    went.

    Returns:
        The largest difference of any logit.

    Raises:
        RunFolderError: the target is not empty or cannot be written.
        ConfigError: a merged model was asked for, and transformers knows no such head.
        FedLoRAError: the logits differ by more than ``TOLERANCE``.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target} is not an empty folder; choose another")
    if merge and run.config.model.head != "linear":
        raise ConfigError(
            f"export: transformers knows no {run.config.model.head} head, and would read a merged model as another one;"
            " export the adapter instead, without --merge"
        )
    if merge:
        base = _merge_base(run)
        probe = _probe(base.tokenizer)
        model = with_adapter(run, base)
        expected = _logits(model, base, probe)
        with writing(target):
            _write_merged(model.merge_and_unload(), base, target)
        note_export(run.folder, target, "merged", run.state.round)
        plain = {"name": str(target), "quantization": "none", "dtype": "float32", "revision": None}
        settings = run.config.model.model_copy(update=plain)
        written = load(replace(run, config=run.config.model_copy(update={"model": settings})))
        found = _logits(written.model, written, probe)
    else:
        base = load(run)
        probe = _probe(base.tokenizer)
        expected = _logits(with_adapter(run, base), base, probe)
        export_adapter(run.state, run.config, run.task, target)
        note_export(run.folder, target, "adapter", run.state.round)  # one that fails the comparison is a copy too
        again = load(run)
        found = _logits(PeftModel.from_pretrained(again.model, target), again, probe)
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE:
        raise FedLoRAError(
            f"{target}: the exported logits differ by {difference:.2e}, above {TOLERANCE:g}; do not use it"
        )
    return difference


def _merge_base(run: Run) -> Base:
    """The base as it is merged into: fp32, and dequantised if it was 4-bit, so that nothing is rounded twice."""
    base = load(run)
    if run.config.model.quantization != "none":
        base.model = base.model.dequantize()
    base.model.float()
    return base


def _write_merged(merged: Any, base: Base, target: Path) -> None:
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.save_pretrained(target)
    base.tokenizer.save_pretrained(target)


def _probe(tokenizer: Any) -> list[Example]:
    texts = ["The committee will meet again on Friday.", "Prices rose by two per cent.", "Who won the match?"]
    return [Example(ids, list(ids)) for ids in tokenizer(texts)["input_ids"]]


@torch.no_grad()
def _logits(model: Any, base: Base, probe: list[Example]) -> torch.Tensor:
    model.eval()
    batch = collate(probe, base.tokenizer.pad_token_id, base.device)
    if base.spec.task == "sequence-classification":
        batch["labels"] = torch.zeros(len(probe), dtype=torch.int64, device=base.device)
    return targets_and_logits(model, batch)[0].cpu()
