"""The frozen base model: load, quantise, find where adapters go, attach them at any rank."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizer threads and forked workers deadlock

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from fedlora.adapter.algebra import stack
from fedlora.adapter.directory import TASK_TYPES
from fedlora.adapter.ledger import frozen as frozen_by
from fedlora.adapter.peft import extract
from fedlora.adapter.state import LowRank
from fedlora.errors import ModelError, nearest
from fedlora.protocol import BaseInfo, Patch
from fedlora.seeds import derive_seed
from fedlora.training.base_patches import SideUpdates, base_layer, merge, takes_patches
from fedlora.training.builtin import resolve
from fedlora.training.heads import HEADS, put_cosine_head
from fedlora.training.prefix import put_prefix

_HALF_DONE = (Patch("half done", b""),)


@dataclass(frozen=True)
class BaseSpec:
    """Which model, and for what.

    Attributes:
        name: hub name, path or builtin.
        task: ``sequence-classification`` or ``causal-lm``.
        labels: label set of a classifier in index order.
        seed: of a new classification head.
        head: ``linear`` or ``cosine``, of a classifier.
    """

    name: str
    task: str
    labels: tuple[str, ...] = ()
    dtype: str = "auto"
    quantization: str = "none"
    revision: str | None = None
    device: str = "auto"
    seed: int = 0
    head: str = "linear"


@dataclass(frozen=True)
class AdapterSpec:
    """Where adapters go and how they scale.

    Attributes:
        scaling: factor in front of ``B @ A``, the same at every rank.
    """

    target_modules: tuple[str, ...] | str
    scaling: float
    lora_dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | None = None


@dataclass
class Base:
    """A loaded base model with its tokenizer."""

    spec: BaseSpec
    model: Any
    tokenizer: Any
    device: torch.device
    fingerprint: str


class AdaptedModel:
    """One base model that carries one adapter per distinct rank; the base is shared by all.

    Args:
        prefix_bytes, tokens: memory for what frozen layers below the adapters make of each row, and of how many tokens
            at most, see ``put_prefix``. Not for a model whose base weights somebody changes.
    """

    def __init__(self, base: Base, spec: AdapterSpec, prefix_bytes: float = 0, tokens: int = 0):
        self.base = base
        self.spec = spec
        self._sites = find_sites(base.model, spec.target_modules)
        self._saved = find_saved(base.model, spec.modules_to_save, base.spec.task)
        self._peft: Any = None
        writes = base.spec.task == "causal-lm"
        self.prefix = put_prefix(base.model, self._sites, self._saved, prefix_bytes, tokens, writes)
        self.merges = takes_patches(base.model, list(self._sites))
        self._patches: tuple[Patch, ...] = ()
        self._side = SideUpdates(base.model)
        self._beside: tuple[tuple[str, ...], Mapping[str, LowRank]] = ((), {})

    def patch_base(self, patches: Sequence[Patch], frozen: Mapping[str, LowRank] | None = None) -> None:
        """Bring the base to a state of the ledger, and put one client's frozen components beside it.

        Patches that are there already stay; a ledger that does not continue the present one (a compaction, an
        earlier round) starts from the weights as they are on disk.
        """
        new = tuple(patch.id for patch in patches)
        if self.merges:
            have = tuple(patch.id for patch in self._patches)
            if new[: len(have)] != have:
                self._patches = _HALF_DONE
                self._reload()
                have = ()
            missing = patches[len(have) :]
            if missing:
                self._patches = _HALF_DONE  # until it is done: whatever fails on the way, the next call reloads
                merge(self.base.model, missing)
            self._side.put(frozen or {})
        else:
            if new != self._beside[0]:
                self._beside = (new, frozen_by(patches).modules)
            self._side.put(stack([self._beside[1], frozen or {}]))
        self._patches = tuple(patches)

    def _reload(self) -> None:
        """The base's own weights again; adapters and heads are written anew for every task anyway."""
        fresh = load_base(self.base.spec).model
        for path in self._sites:
            base_layer(self.base.model, path).weight.data.copy_(base_layer(fresh, path).weight.data)

    def info(self) -> BaseInfo:
        """What the server needs to know of the base."""
        parameters = sum(p.numel() for name, p in self.base.model.named_parameters() if ".lora_" not in name)
        state = extract(self.at_rank(1), "r1")
        if set(state.modules) != set(self._sites):
            raise ModelError(f"target_modules: adapters went to {sorted(state.modules)}, not {sorted(self._sites)}")
        spec = self.base.spec
        return BaseInfo(
            spec.task, spec.labels, self.base.fingerprint, self._sites, state.dense, parameters, self.merges
        )

    def at_rank(self, rank: int) -> Any:
        """The PeftModel with the adapter ``r<rank>`` active; nothing is trainable yet."""
        name = adapter_name(rank)
        config = LoraConfig(
            r=rank,
            lora_alpha=self.spec.scaling * rank,  # PEFT divides by the rank
            lora_dropout=self.spec.lora_dropout,
            use_dora=self.spec.use_dora,
            target_modules=sorted(self._sites),
            modules_to_save=self._saved or None,
            task_type=TASK_TYPES[self.base.spec.task],
        )
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # PEFT warns of settings that are deliberate here
            if self._peft is None:
                self._peft = get_peft_model(self.base.model, config, adapter_name=name)
            elif name not in self._peft.peft_config:
                self._peft.add_adapter(name, config)
        self._peft.set_adapter(name)
        self._peft.to(self.base.device)
        self._peft.requires_grad_(False)
        return self._peft


def adapter_name(rank: int) -> str:
    """The name of the adapter of a rank, see ``AdaptedModel.at_rank``."""
    return f"r{rank}"


def load_base(spec: BaseSpec) -> Base:
    """Load the model and its tokenizer.

    A new classification head is initialised from ``spec.seed``, so every worker has the same one.

    Raises:
        ModelError: if the model is not there, or cannot be loaded as asked.
    """
    _check_head(spec)
    path = resolve(spec.name)
    device = device_of(spec.device)
    options: dict[str, Any] = {"dtype": dtype_of(spec.dtype, device), "revision": spec.revision}
    if spec.quantization == "nf4":
        options["quantization_config"] = _nf4(device)
        options["device_map"] = {"": str(device)}
    with _loading(spec.name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(spec.seed, 0, "", "head"))
        model: Any
        if spec.task == "sequence-classification":
            names = dict(enumerate(spec.labels))
            options |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names), **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=spec.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if spec.quantization == "none":
        model.to(device)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights in place for a bf16 kernel the first time a CPU evaluates: training
        # after an evaluation would then differ from training before it, and small layers fail outright
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if spec.head == "cosine":
        put_cosine_head(model)
    model.requires_grad_(False)
    return Base(spec, model, tokenizer, device, fingerprint(model))


def outline(spec: BaseSpec) -> Any:
    """The model without weights, on the meta device: enough to check names and sizes.

    Raises:
        ModelError: if the model is not there, or has no head of the kind that is asked for.
    """
    _check_head(spec)
    path = resolve(spec.name)
    with _loading(spec.name):
        config = AutoConfig.from_pretrained(path, revision=spec.revision)
        if spec.task == "sequence-classification":
            config.num_labels = max(len(spec.labels), 2)
        kind: Any = (
            AutoModelForSequenceClassification if spec.task == "sequence-classification" else AutoModelForCausalLM
        )
        with torch.device("meta"):
            model = kind.from_config(config)
    if spec.head == "cosine":
        put_cosine_head(model)
    return model


def _check_head(spec: BaseSpec) -> None:
    if spec.head != "linear" and spec.task != "sequence-classification":
        raise ModelError(
            f"model.head: {spec.head} is for classifiers, and {spec.name} is used as a language model, whose head is"
            " not trained; leave model.head out"
        )


def find_sites(model: nn.Module, targets: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that gets an adapter, by path.

    Args:
        model: the base.
        targets: module names or path suffixes, a regular expression over whole paths, or ``all-linear``
            (every linear layer but the output head), as in PEFT.

    Raises:
        ModelError: for a name that matches nothing, or a module that is not linear.
    """
    layers = {name: size for name, module in model.named_modules() if (size := _linear_size(module)) is not None}
    heads = {id(module) for module in [getattr(model, "get_output_embeddings", lambda: None)()] if module is not None}
    inner = {
        name: size
        for name, size in layers.items()
        if id(model.get_submodule(name)) not in heads and name.split(".")[0] not in HEADS
    }
    if targets == "all-linear":
        return inner
    if isinstance(targets, str):
        try:
            chosen = {name: size for name, size in inner.items() if re.fullmatch(targets, name)}
        except re.error as error:
            raise ModelError(f"lora.target_modules: {targets} is not a regular expression: {error}") from error
        if not chosen:
            raise ModelError(f"lora.target_modules: the pattern {targets} matches no linear layer{_names(inner)}")
        return chosen
    chosen = {}
    for target in targets:
        found = {name: size for name, size in inner.items() if name == target or name.endswith(f".{target}")}
        if not found:
            short = sorted({name.rpartition(".")[2] for name in inner})
            raise ModelError(
                f"lora.target_modules: no linear layer is called {target}{nearest(target, short, 3)}{_names(inner)}"
            )
        chosen |= found
    return chosen


def check_length(model: Any, max_length: int) -> None:
    """Raise ``ModelError`` if rows may be longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ModelError(f"data.max_length is {max_length}, but the model has {limit} positions; lower data.max_length")


def find_saved(model: nn.Module, names: Sequence[str] | None, task: str) -> list[str]:
    """Modules trained in full: those named, or the head of a classifier.

    Raises:
        ModelError: for a name that matches nothing.
    """
    known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in names or ():
        if name not in known:
            raise ModelError(f"lora.modules_to_save: no module is called {name}{nearest(name, known, 3)}")
    return list(names or find_heads(model, task))


def find_heads(model: nn.Module, task: str) -> list[str]:
    """Names of the new layers that are trained in full: the head of a classifier."""
    if task != "sequence-classification":
        return []
    return [name for name, _ in model.named_children() if name in HEADS]


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, precision and a sample of every tensor of the base, new heads left out.

    Up to 1,024 values spread over each tensor are hashed, so that a 7B model takes seconds.
    """
    total = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in HEADS:
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(picked.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):  # bitsandbytes' layers are subclasses
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None


def _names(layers: Mapping[str, Any]) -> str:
    short = sorted({name.rpartition(".")[2] for name in layers})
    return f" (linear layers of this model: {', '.join(short[:12])})"


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch finds no GPU; use auto or cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        # on a CPU bf16 is slower than fp32 even where the instructions exist
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _nf4(device: torch.device) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of("auto", device),
        llm_int8_skip_modules=["lm_head", *HEADS],  # new heads are trained, so they stay in full precision
    )


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Quiet loading; whatever goes wrong becomes one sentence."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        hint = " (a path that does not exist is looked up on the hub)" if isinstance(error, OSError) else ""
        raise ModelError(f"model.name: cannot load {name}: {cause[:300]}{hint}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers: the screen belongs to the run."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
