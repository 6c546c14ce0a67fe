"""Adapters as the directories PEFT loads. The one place that knows ``alpha / r``; it does without PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fedlora.adapter.state import AdapterState, LowRank
from fedlora.errors import AdapterError

PREFIX = "base_model.model."  # PEFT's, before every path of the base
TASK_TYPES = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def save_directory(
    state: AdapterState, directory: Path, base_name: str, task_type: str, lora_alpha: float, use_rslora: bool
) -> None:
    """Write a state as a PEFT directory that ``PeftModel.from_pretrained`` loads.

    Cores and frozen components are folded in, since PEFT knows neither. Modules may have different ranks
    (PEFT's ``rank_pattern``).

    Args:
        state: adapter in effective units.
        directory: created if missing.
        base_name: name or path of the base model, for ``base_model_name_or_path``.
        task_type: PEFT's, such as ``SEQ_CLS`` or ``CAUSAL_LM``.
        lora_alpha, use_rslora: the scaling the saved factors are to carry.
    """
    state = state.whole()
    rank = state.rank
    magnitudes = {name for name in state.dense if name.endswith(".lora_magnitude_vector")}
    heads = sorted({_head(name) for name in set(state.dense) - magnitudes})
    patterns = {path: update.rank for path, update in sorted(state.modules.items()) if update.rank != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": use_rslora,
        "use_dora": bool(magnitudes),
        "target_modules": sorted(state.modules),
        "rank_pattern": patterns,
        "modules_to_save": heads or None,
    }
    tensors = to_peft_names(state, lora_alpha, use_rslora)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def load_directory(directory: Path) -> AdapterState:
    """Read a PEFT directory written by ``save_directory``, in effective units.

    Raises:
        AdapterError: if a file is missing or unreadable.
    """
    try:
        settings: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
        return from_peft_names(tensors, settings["lora_alpha"], settings["use_rslora"])
    except Exception as error:  # safetensors raises its own type for a bad file
        raise AdapterError(f"{directory}: not a readable PEFT adapter: {error}") from error


def scale(lora_alpha: float, rank: int, use_rslora: bool) -> float:
    """PEFT's factor in front of ``B @ A``: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
    return lora_alpha / (rank**0.5 if use_rslora else rank)


def to_peft_names(state: AdapterState, lora_alpha: float, use_rslora: bool) -> dict[str, Tensor]:
    """What PEFT's ``get_peft_model_state_dict`` gives for an adapter of this state; cores have to be folded in."""
    tensors: dict[str, Tensor] = {}
    for path, update in state.modules.items():
        scaling = scale(lora_alpha, update.rank, use_rslora)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = update.A.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (update.B / scaling).contiguous()
    for name, tensor in state.dense.items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous()
    return tensors


def from_peft_names(tensors: Mapping[str, Tensor], lora_alpha: float, use_rslora: bool) -> AdapterState:
    """The state, in effective units, that PEFT's ``get_peft_model_state_dict`` shows.

    Raises:
        KeyError: if a module has one factor only.
    """
    modules, dense = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            B = tensors[f"{PREFIX}{path}.lora_B.weight"]
            modules[path] = LowRank(B * scale(lora_alpha, B.shape[1], use_rslora), tensor)
        elif not name.endswith(".lora_B.weight"):
            dense[name] = tensor
    return AdapterState(modules, dense)


def _head(name: str) -> str:
    """The module that a parameter trained in full belongs to.

    PEFT saves a classifier as a whole whether asked to or not: naming a layer inside it breaks the loading.
    """
    parts = name.split(".")[:-1]
    whole = next((place for place, part in enumerate(parts) if part in ("classifier", "score")), len(parts))
    return ".".join(parts[: whole + 1])
