"""What a node lets a server ask of it: ``client_policy.yaml``, written by whoever owns the data.

The strategy, the size of the cohort and whether it is private are the server's word: a node cannot see them. Ranks,
steps, local methods, the base model, masks and noise of its own are what the node itself does, and it sees to them.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from clients.recipe import Recipe, RecipeRefused
from fedlora.config.sections import Section
from fedlora.errors import ConfigError, nearest
from fedlora.privacy.messages import AskShares, read_request
from fedlora.protocol import EvalTask, TrainTask
from fedlora.training.batches import steps_of

PRIVATE = frozenset({"dp"})  # layers of a strategy that make a run private


class Policy(Section):
    """The rules of one node. What is left out is not limited, but for rank and steps."""

    base_fingerprints: list[str] | None = Field(None, description="bases it trains; default: whatever its model holds")
    max_rank: int = Field(64, ge=1, description="of the adapters it receives")
    max_steps: int = Field(1000, ge=1, description="batches of one task")
    max_rounds: int | None = Field(None, ge=1, description="rounds of a run")
    strategies: list[str] | None = Field(None, description="names of every layer of the server's stack")
    methods: list[str] | None = Field(None, description="local methods, such as fedprox; [] for none")
    min_cohort: int = Field(1, ge=1, description="clients a round asks together, as the server says")
    require_dp: bool = Field(False, description="the server's strategy has to be differentially private")
    require_secure_sum: bool = Field(False, description="no update leaves the node but under the masks of a secure sum")
    require_local: bool = Field(False, description="no update leaves the node without noise from its own secret")
    min_noise: float = Field(0.0, ge=0, description="least privacy.local.noise_multiplier where require_local is set")
    min_score_rows: int = Field(10, ge=1, description="a score is over so many rows or not given")
    allow_forget: bool = Field(False, description="whether the server may name rows, by hash, to leave out")
    tell_labels: bool = Field(False, description="whether the server may know how many rows each label has")
    tell_errors: bool = Field(False, description="whether the server may see tracebacks, which can quote rows")


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: missing, not YAML, or with a key that is no rule.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"policy: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return Policy.model_validate(content or {})
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            told = f"is not a rule{nearest(key, Policy.model_fields)}" if unknown else item["msg"].lower()
            problems.append(f"policy: {path}: {key or 'the file'} {told}")
        raise ConfigError(*problems) from error


def check_run(policy: Policy, recipe: Recipe) -> None:
    """Raise ``RecipeRefused`` where a run as a whole is outside the policy."""
    allowed = policy.strategies
    if allowed is not None and (odd := next((name for name in recipe.strategy if name not in allowed), None)):
        _refuse("strategies", f"are {', '.join(allowed) or 'none'}", f"the server's strategy has {odd:.60}")
    if policy.require_dp and not PRIVATE & set(recipe.strategy):
        stack = ", ".join(recipe.strategy)
        _refuse("require_dp", "is set", f"the server's strategy ({stack:.80}) is not private")
    if policy.require_secure_sum and recipe.privacy.secure_sum is None:
        _refuse("require_secure_sum", "is set", "the server asks for updates as they are")
    if policy.require_local and (recipe.privacy.local is None or recipe.privacy.local.noise != "secret"):
        asked = "noise from the run's seed, which it knows" if recipe.privacy.local else "updates without noise"
        _refuse("require_local", "is set", f"the server asks for {asked}")
    if recipe.privacy.local and policy.require_local and recipe.privacy.local.noise_multiplier < policy.min_noise:
        asked = f"the server asks for {recipe.privacy.local.noise_multiplier:g}"
        _refuse("min_noise", f"is {policy.min_noise:g}", asked)
    if recipe.data.forget and not policy.allow_forget:
        _refuse("allow_forget", "is not set", "the server names rows, and would learn which of them are here")
    if policy.max_rounds is not None and recipe.rounds > policy.max_rounds:
        _refuse("max_rounds", f"is {policy.max_rounds}", f"the server plans {recipe.rounds}")


def check_base(policy: Policy, mine: str, wanted: str) -> None:
    """Raise ``RecipeRefused`` unless the node's base may be trained, and is the server's.

    Args:
        mine: fingerprint of the node's base.
        wanted: of the server's; empty where it has not said.
    """
    allowed = policy.base_fingerprints
    if allowed is not None and mine not in allowed:
        _refuse("base_fingerprints", "leave it out", f"this node's base is {mine[:12]}")
    if wanted and wanted != mine:
        raise RecipeRefused(f"refused: the server's base model is {wanted[:12]:.12}, this node has {mine[:12]}")


def check_task(policy: Policy, recipe: Recipe, task: TrainTask, cohort: int, rows: int) -> None:
    """Raise ``RecipeRefused`` where one piece of training is outside the policy.

    Args:
        cohort: clients that are asked together.
        rows: that the node trains on.
    """
    if task.plan.rank > policy.max_rank:
        _refuse("max_rank", f"is {policy.max_rank}", f"the server asked for rank {task.plan.rank}")
    how = recipe.training
    batches = how.per_device_train_batch_size, how.gradient_accumulation_steps
    steps = how.gradient_accumulation_steps * steps_of(max(rows, 1), *batches, how.max_steps, how.num_train_epochs)
    if steps > policy.max_steps:
        _refuse("max_steps", f"is {policy.max_steps}", f"the server asked for {steps} steps")
    if task.round > recipe.rounds:
        raise RecipeRefused(f"refused: round {task.round} of a run of {recipe.rounds}")
    if cohort < policy.min_cohort:
        _refuse("min_cohort", f"is {policy.min_cohort}", f"the server asks {cohort} clients together")
    methods = [method.name for method in task.plan.methods]
    if policy.methods is not None and (odd := next((name for name in methods if name not in policy.methods), None)):
        _refuse("methods", f"are {', '.join(policy.methods) or 'none'}", f"the server asked for {odd:.60}")
    if task.forget is not None or task.stage is not None or task.ended or task.seen:
        raise RecipeRefused("refused: a node takes part in plain rounds; it has no stream and no forget rounds")


def check_letter(policy: Policy, letter: bytes) -> None:
    """Raise ``RecipeRefused`` for a secure sum of too few."""
    asked = read_request(letter)
    if isinstance(asked, AskShares) and len(asked.session.keys) < policy.min_cohort:
        _refuse("min_cohort", f"is {policy.min_cohort}", f"the sum is over {len(asked.session.keys)} clients")


def check_score(policy: Policy, client: str, task: EvalTask) -> None:
    """Raise ``RecipeRefused`` for a score that is not over all of the node's held-out or test rows."""
    if policy.require_local:
        _refuse("require_local", "is set", "the server asks for scores, which have no noise")
    if task.subject not in (client, ""):
        raise RecipeRefused(f"refused: this node is {client}, not {task.subject:.60}")
    if task.num_shards != 1 or task.shard or task.prototypes:
        raise RecipeRefused("refused: a score is over all rows; one over a few of them would tell of single rows")
    if task.features or task.probe or task.stage is not None:
        raise RecipeRefused("refused: this node gives scores, not features, and has neither a stream nor a probe")


def check_rank(policy: Policy, rank: int) -> None:
    """Raise ``RecipeRefused`` for an adapter of more than the allowed rank."""
    if rank > policy.max_rank:
        _refuse("max_rank", f"is {policy.max_rank}", f"the server sent rank {rank}")


def _refuse(rule: str, is_: str, came: str) -> None:
    raise RecipeRefused(f"refused by policy: {rule} {is_}, {came}")
