"""The whole configuration of a run, and what holds between its sections."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from fedlora.config.federation import FederationConfig, FlowerConfig
from fedlora.config.forgetting import ForgettingConfig
from fedlora.config.privacy import PrivacyConfig
from fedlora.config.sections import (
    AdmissionConfig,
    AttackConfig,
    ClientsConfig,
    ContributionsConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    LedgerConfig,
    LoraConfig,
    ModelConfig,
    RayConfig,
    ScheduleConfig,
    Section,
    StoreConfig,
    TrainingConfig,
    WireConfig,
)
from fedlora.config.stream import ContinualConfig

# where results go, who looks on, what is kept on the way and how nodes are reached: they do not define the results
AROUND = ("output_dir", "store", "contributions", "flower")


class RunConfig(Section):
    """Everything that defines a run."""

    name: str | None = None
    model: ModelConfig
    data: DataConfig
    clients: ClientsConfig = ClientsConfig()
    federation: FederationConfig = FederationConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wire: WireConfig = WireConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    admission: AdmissionConfig = AdmissionConfig()
    attack: AttackConfig | None = None
    strategy: str | dict[str, dict[str, Any] | None] | list[str | dict[str, dict[str, Any] | None]] = Field(
        "flexlora", description="a rule, a rule with its options, or wrappers and a rule: [{clip: {}}, flexlora]"
    )
    ledger: LedgerConfig = LedgerConfig()
    continual: ContinualConfig | None = Field(None, description="a stream of tasks; its rounds are those of the run")
    forgetting: list[ForgettingConfig] = Field([], description="rounds in which clients forget rows")
    plugins: list[str] = Field([], description="Python files that register strategies, wrappers or attacks")
    weighting: Literal["examples", "uniform"] = "examples"
    rounds: int = Field(10, ge=1)
    seed: int = Field(0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()
    fleet: FleetConfig | None = Field(None, description="simulated devices with a virtual clock; {} for the defaults")
    pool: Literal["local", "ray", "flower"] = "local"
    ray: RayConfig = RayConfig()
    flower: FlowerConfig = FlowerConfig()
    store: StoreConfig = StoreConfig()
    contributions: ContributionsConfig | None = Field(
        None, description="keep what clients sent, for actions of unlearning that need it; {} for the defaults"
    )
    threads: int | None = Field(None, ge=1, description="torch threads per worker; default: all cores, or ray.num_cpus")
    keep_checkpoints: int = Field(2, ge=1)
    output_dir: str = "runs/default"

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        problems = []
        largest = max(_listed_ranks(self.clients.ranks), default=0)
        if largest > self.lora.r:
            problems.append(
                f"clients.ranks asks for rank {largest}, but the global adapter has lora.r={self.lora.r}; raise lora.r"
            )
        tasks = self.continual.tasks if self.continual else []
        if self.continual and self.continual.live:
            problems += _sources_of_live(self.data)
        elif self.pool == "flower":
            problems += _of_flower(self)
        elif not (tasks and all(task.data and _has_source(task.data) for task in tasks)) and not _has_source(self.data):
            problems.append("data needs a name, a train_file or client_files")
        if self.data.client_files and self.data.max_train_rows:
            problems.append("data.max_train_rows samples one dataset; it is not used with client_files")
        if self.data.client_files and self.data.train_file:
            problems.append("data has both train_file and client_files; give one")
        if self.continual:
            total = sum(self.continual.task_rounds)
            if "rounds" in self.model_fields_set and self.rounds != total:
                problems.append(f"rounds is {self.rounds}, but the tasks of continual take {total}; leave rounds out")
            self.__dict__["rounds"] = total  # of a frozen model, before anybody has seen it
            # merged once, so that a configuration that was written out and read back means the same
            tasks = [task.model_copy(update={"data": _merged(self.data, task.data)}) for task in self.continual.tasks]
            self.__dict__["continual"] = self.continual.model_copy(update={"tasks": tasks})
        if self.continual and self.contributions:
            problems.append("contributions: the rounds of a stream cannot be aggregated again from a log; leave it out")
        if self.continual and not self.evaluation.at_start:
            problems.append("evaluation.at_start: what a stream brings is measured from its start; leave it on")
        problems += _of_forgetting(self)
        problems += _of_shards(self)
        layers = self.strategy if isinstance(self.strategy, list) else [self.strategy]
        if not layers or any(isinstance(layer, dict) and len(layer) != 1 for layer in layers):
            problems.append("strategy is a name, one name with its options, or a list of these")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def strategy_name(self) -> str:
        """Names of the strategy's layers, outermost first: ``server_momentum(clip(flexlora))``."""
        layers = self.strategy if isinstance(self.strategy, list) else [self.strategy]
        names = [layer if isinstance(layer, str) else next(iter(layer)) for layer in layers]
        return "(".join(names) + ")" * (len(names) - 1)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Hash of what defines the results: everything but where they are written and who looks on."""
        content = {key: value for key, value in self.resolved().items() if key not in AROUND}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load_config`` reads back."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def _sources_of_live(data: DataConfig) -> list[str]:
    """What is wrong with the data of a run whose training rows come from a live stream."""
    if data.name or data.train_file or data.client_files:
        return ["data: training rows come from continual.live; leave name, train_file and client_files out"]
    return (
        [] if data.test_file else ["data.test_file: a live stream has no rows to hold out; give the server's test rows"]
    )


def _of_flower(config: RunConfig) -> list[str]:
    """What is wrong with a configuration whose clients are organisations with rows, models and ranks of their own."""
    problems = []
    if _has_source(config.data):
        problems.append("data: with pool: flower rows stay on the nodes; leave name, train_file and client_files out")
    if not config.data.labels and config.model.task != "causal-lm":
        problems.append(
            "data.labels: with pool: flower nobody sees all rows; give the label set that all nodes share, or set"
            " model.task: causal-lm"
        )
    if config.clients.ranks is not None:
        problems.append("clients.ranks: with pool: flower every node says its own rank; leave it out")
    odd = [key for key in ("continual", "forgetting", "attack") if getattr(config, key)]
    odd += ["federation.shards"] if config.federation.shards > 1 else []
    problems += [f"{key} does not go together with pool: flower yet; leave one out" for key in odd]
    return problems


def _of_forgetting(config: RunConfig) -> list[str]:
    """What is wrong with the rounds in which clients forget."""
    if config.forgetting and (config.continual or config.attack):
        return [f"forgetting does not go together with {'continual' if config.continual else 'attack'}; leave one out"]
    if config.forgetting and config.wire.error_feedback:
        return [
            "forgetting: with wire.error_feedback clients would later send what they kept of the rows that are to be"
            " forgotten; set wire.error_feedback: false"
        ]
    problems, taken = [], set[int]()
    for one in config.forgetting:
        if one.last > config.rounds or taken & set(one.rounds):
            problems.append(
                f"forgetting: rounds {one.first} to {one.last} are not all free; the run has {config.rounds}, and each"
                " belongs to one entry"
            )
        taken |= set(one.rounds)
        if one.records and not set(one.records) <= set(config.data.forget):
            problems.append("forgetting.records are not all in data.forget too: other rounds would learn them again")
        if not one.records and (odd := sorted(set(one.clients) - set(config.clients.exclude))):
            problems.append(f"forgetting: {odd[0]} forgets all it has, and would go on learning it; exclude it")
    return problems


def _of_shards(config: RunConfig) -> list[str]:
    """What is wrong with the rest of a configuration whose clients are dealt into shards."""
    reasons = {
        "continual": "the tasks of a stream are frozen into one base, and every shard would have its own",
        "forgetting": "shards are unlearned by playing one of them again, never by forget rounds",
        "contributions": "the actions that read the log are not for shards, which are unlearned by shard_retrain",
    }
    odd = [key for key in reasons if getattr(config, key) not in (None, [])] if config.federation.shards > 1 else []
    return [f"federation.shards does not go together with {key}: {reasons[key]}; leave one out" for key in odd]


def _has_source(data: DataConfig) -> bool:
    return bool(data.name or data.train_file or data.client_files)


def _merged(data: DataConfig, own: DataConfig | None) -> DataConfig | None:
    """The data of a task that has some of its own: what it does not say is as in the run's, but for the source."""
    if own is None:
        return None
    given = {key: getattr(own, key) for key in own.model_fields_set}
    if _has_source(own):
        given = dict.fromkeys(("name", "config", "train_file", "test_file", "client_files"), None) | given
    return data.model_copy(update=given)


def _listed_ranks(ranks: list[int] | dict[str, dict[int, float]] | None) -> list[int]:
    if isinstance(ranks, dict):
        return list(next(iter(ranks.values())))
    return ranks or []
