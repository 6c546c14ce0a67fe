"""What a server may say of a run to an organisation it does not own, and what that makes of the run there.

A recipe has numbers, names of known methods and the label set. It has no path, no code and no model: those are the
node's own. An unknown key is an error, so that a server cannot slip anything else in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedlora.config import PrivacyConfig, RunConfig, TrainingConfig, parse_config
from fedlora.config.sections import LoraConfig, Section, WireConfig
from fedlora.errors import ConfigError, FedLoRAError


class RecipeRefused(FedLoRAError):
    """A node does not take part in this run, or in this piece of it; the reason names the rule."""


class RecipeModel(Section):
    """How the node's own base model is loaded."""

    task: Literal["auto", "sequence-classification", "causal-lm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Literal["none", "nf4"]
    head: Literal["linear", "cosine"]


class RecipeData(Section):
    """How the node's own rows are read."""

    labels: list[str] | None
    max_length: int = Field(ge=8)
    test_fraction: float = Field(ge=0, lt=1)
    client_holdout: float = Field(ge=0, lt=1)
    seed: int | None = Field(ge=0)
    forget: list[str]


class Recipe(Section):
    """The part of a configuration that a node needs, and nothing that names a place or code."""

    run: str = Field(
        pattern="^[0-9a-f]{64}$", description="hash of the server's configuration: another run, other state"
    )
    strategy: list[str] = Field(min_length=1, description="names of the layers, outermost first")
    rounds: int = Field(ge=1)
    seed: int = Field(ge=0)
    keep_checkpoints: int = Field(ge=1)
    max_rows_per_client: int | None = Field(ge=1, description="held-out rows that are looked at")
    model: RecipeModel
    data: RecipeData
    lora: LoraConfig
    training: TrainingConfig
    wire: WireConfig
    weighting: Literal["examples", "uniform"]
    privacy: PrivacyConfig

    def digest(self) -> str:
        """SHA-256, in hexadecimal: names what a node keeps of this run."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def recipe_of(config: RunConfig) -> Recipe:
    """What the server tells its nodes. Where it has test rows of its own, nodes hold none out for it."""
    layers = config.strategy if isinstance(config.strategy, list) else [config.strategy]
    model, data = config.model, config.data
    return Recipe(
        run=config.sha256(),
        strategy=[layer if isinstance(layer, str) else next(iter(layer)) for layer in layers],
        rounds=config.rounds,
        seed=config.seed,
        keep_checkpoints=config.keep_checkpoints,
        max_rows_per_client=config.evaluation.max_rows_per_client,
        model=RecipeModel(task=model.task, dtype=model.dtype, quantization=model.quantization, head=model.head),
        data=RecipeData(
            labels=data.labels,
            max_length=data.max_length,
            test_fraction=0 if data.test_file else data.test_fraction,
            client_holdout=data.client_holdout,
            seed=data.seed,
            forget=data.forget,
        ),
        lora=config.lora,
        training=config.training,
        wire=config.wire,
        weighting=config.weighting,
        privacy=config.privacy,
    )


def read_recipe(text: str) -> Recipe:
    """Parse what a server sent.

    Raises:
        RecipeRefused: naming the first key that is not for a server to set, or has an impossible value.
    """
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeRefused(f"refused: {key:.80} is not for a server to set") from None
        raise RecipeRefused(f"refused: the recipe's {key or 'text':.80} is not valid: {first['msg']:.120}") from None


def config_on_node(recipe: Recipe, own: Mapping[str, Any]) -> RunConfig:
    """The run as this node sees it: one client, with its own file, model and folder.

    Args:
        own: ``client``, ``data``, ``model``, ``rank`` and ``output_dir``; also ``device``, ``threads``,
            ``text_column``, ``label_column`` and ``id_column`` where they are not the defaults.

    Raises:
        RecipeRefused: if the two do not make a run.
    """
    columns = {key: own[key] for key in ("text_column", "label_column", "id_column") if own.get(key)}
    told = recipe.model_dump(mode="json")
    content = {
        "name": own["client"],
        "model": {**told["model"], "name": own["model"], "device": own.get("device", "auto")},
        "data": {**told["data"], **columns, "client_files": {own["client"]: own["data"]}},
        "clients": {"ranks": [own["rank"]]},
        "lora": told["lora"],
        "training": told["training"],
        "wire": told["wire"],
        "weighting": told["weighting"],
        "privacy": told["privacy"],
        "evaluation": {"max_rows_per_client": recipe.max_rows_per_client},
        "rounds": recipe.rounds,
        "seed": recipe.seed,
        "threads": own.get("threads"),
        "keep_checkpoints": recipe.keep_checkpoints,
        "output_dir": own["output_dir"],
    }
    try:
        return parse_config(content)
    except ConfigError as error:
        raise RecipeRefused(f"refused: {error.problems[0]}") from None
