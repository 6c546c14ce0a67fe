"""What a configuration says of the model and its adapters, in the terms of ``fedlora.training``."""

from __future__ import annotations

from fedlora.adapter.directory import scale
from fedlora.config import RunConfig
from fedlora.data.partition import Corpus
from fedlora.errors import DataError
from fedlora.training.model import AdapterSpec, BaseSpec


def task_of(config: RunConfig, corpus: Corpus) -> str:
    """The model's task: as configured, else what the form of the rows asks for.

    Raises:
        DataError: if the configured task cannot be trained on such rows.
    """
    natural = "sequence-classification" if corpus.form == "classification" else "causal-lm"
    if config.model.task not in ("auto", natural):
        raise DataError(f"model.task is {config.model.task}, but the rows are {corpus.form}, which is for {natural}")
    return natural


def base_spec(config: RunConfig, task: str, labels: tuple[str, ...]) -> BaseSpec:
    """The base model of a run."""
    model = config.model
    return BaseSpec(
        name=model.name,
        task=task,
        labels=labels,
        dtype=model.dtype,
        quantization=model.quantization,
        revision=model.revision,
        device=model.device,
        seed=config.seed,
        head=model.head,
    )


def adapter_spec(config: RunConfig) -> AdapterSpec:
    """Where a run's adapters go."""
    lora = config.lora
    targets = lora.target_modules
    return AdapterSpec(
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        scaling=scale(lora.lora_alpha, lora.r, lora.use_rslora),
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        modules_to_save=tuple(lora.modules_to_save) if lora.modules_to_save else None,
    )
