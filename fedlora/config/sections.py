"""The sections of a configuration, one class each, with every key's type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The frozen base model."""

    name: str = Field(description="hub name, path, builtin:minilm, builtin:smollm2-135m, or a tiny random model")
    task: Literal["auto", "sequence-classification", "causal-lm"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4"] = "none"
    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    head: Literal["linear", "cosine"] = Field(
        "linear", description="of a classifier; cosine: scale * cos(feature, row), without a bias, the scale learned"
    )


class PartitionConfig(Section):
    """How one dataset becomes many clients; names and meaning are flwr-datasets'."""

    method: Literal[
        "iid", "dirichlet", "natural", "pathological", "shards", "sizes", "linear", "square", "exponential"
    ] = "iid"
    by: str | None = Field(None, description="column that decides; default the label")
    alpha: float = Field(0.5, gt=0, description="dirichlet: smaller is more skewed")
    classes_per_client: int = Field(2, ge=1, description="pathological")
    shards_per_client: int = Field(2, ge=1, description="shards")
    sizes: list[Annotated[int, Field(ge=1)]] | None = Field(None, description="sizes: rows of each client")
    min_rows: int = Field(1, ge=1, description="dirichlet: redraw until every client has this many rows")


class DataConfig(Section):
    """Where rows come from."""

    name: str | None = Field(None, description="hub name, or builtin:bbc-news, builtin:chatterbot, builtin:toy")
    config: str | None = Field(None, description="configuration of a hub dataset")
    train_split: str = "train"
    test_split: str | None = Field("test", description="null holds test rows out of the training rows")
    train_file: str | None = None
    test_file: str | None = None
    client_files: dict[str, str] | str | None = Field(
        None, description="one file per client: {name: path}, or a glob whose file names become client names"
    )
    text_column: str | None = None
    label_column: str | None = None
    labels: list[str] | None = Field(None, description="the label set; default: the labels of the training rows")
    max_length: int = Field(128, ge=8, description="tokens a row is cut to")
    max_train_rows: int | None = Field(None, ge=1)
    max_test_rows: int | None = Field(None, ge=1)
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="held out for the server where there is no test set; 0 for none"
    )
    client_holdout: float = Field(0.1, ge=0, lt=1, description="share of each client's rows kept for evaluation")
    partition: PartitionConfig = PartitionConfig()
    seed: int | None = Field(
        None, ge=0, description="of samples, held-out rows and the division among clients; default the run's seed"
    )
    id_column: str | None = Field(None, description="column that names a row; default its text")
    forget: list[str] = Field(
        [], description="SHA-256 of the names of rows that clients leave out; rows keep their place in the partition"
    )


def _read_ranks(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, list):
        bad = [rank for rank in value if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1]
        if not value or bad:
            raise ValueError(f"ranks are whole numbers of at least 1, not {bad[0] if bad else value}")
        return value
    kinds = ("distribution", "by_memory_gb", "by_speed")
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in kinds:
        kind, table = next(iter(value.items()))
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{kind} needs a mapping, such as {{4: 0.5, 8: 0.3, 16: 0.2}}")
        odd = [n for n in table.values() if isinstance(n, bool) or not isinstance(n, int | float) or n < 0]
        if odd:
            raise ValueError(f"{kind} maps ranks to numbers of at least 0, not {odd[0]}")
        return {kind: {_whole(rank): float(number) for rank, number in table.items()}}
    raise ValueError(
        "expected a rank, a list of ranks (dealt to clients in turn), {distribution: {rank: share}},"
        " {by_memory_gb: {rank: least memory}} or {by_speed: {rank: least examples_per_s}}"
    )


def _whole(rank: Any) -> int:
    if isinstance(rank, bool) or not str(rank).isdigit() or int(rank) < 1:
        raise ValueError(f"ranks are whole numbers of at least 1, not {rank}")
    return int(rank)


class ClientsConfig(Section):
    """Who takes part."""

    count: int = Field(10, ge=1, description="clients the data is divided into (not used with client_files)")
    per_round: int | float = Field(1.0, gt=0, description="clients a round selects: a number, or a share below 1")
    ranks: Annotated[list[int] | dict[str, dict[int, float]] | None, BeforeValidator(_read_ranks)] = Field(
        None, description="LoRA rank per client; default lora.r for all"
    )
    memory_gb: list[float] | None = Field(None, description="memory each client declares, dealt in turn")
    examples_per_s: list[float] | None = Field(None, description="speed each client declares, dealt in turn")
    joins: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="{client: round}: it is not there before that round"
    )
    exclude: list[str] = Field(
        [],
        description="clients that are never asked and never scored; they keep their place in every draw",
    )
    selection: str | dict[str, dict[str, Any] | None] = Field(
        "uniform",
        description="uniform, weighted, round_robin, poisson, power_of_choice, oort, or a plug-in; with its options as"
        " {power_of_choice: {d: 20}}",
    )

    @model_validator(mode="after")
    def _check(self) -> ClientsConfig:
        if isinstance(self.ranks, dict) and "by_memory_gb" in self.ranks and not self.memory_gb:
            raise ValueError("ranks by_memory_gb needs memory_gb, the memory each client declares")
        if isinstance(self.ranks, dict) and "by_speed" in self.ranks and not self.examples_per_s:
            raise ValueError("ranks by_speed needs examples_per_s, the speed each client declares")
        if isinstance(self.per_round, float) and self.per_round > 1 and self.per_round != int(self.per_round):
            raise ValueError(f"per_round is a whole number or a share up to 1, not {self.per_round}")
        return self

    @property
    def declared(self) -> list[float] | None:
        """What each client says of itself where its rank depends on that, in the unit of ``ranks``."""
        by_speed = isinstance(self.ranks, dict) and "by_speed" in self.ranks
        return self.examples_per_s if by_speed else self.memory_gb


class LoraConfig(Section):
    """The adapter, under PEFT's names."""

    r: int = Field(8, ge=1, description="rank of the global adapter, and of clients without their own")
    lora_alpha: float = Field(16, gt=0, description="scaling is lora_alpha / lora.r for every client, at any rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = Field("all-linear", description="names, or all-linear")
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal["kaiming", "gaussian", "orthogonal"] | bool = Field(
        True, description="true is kaiming, as in PEFT"
    )
    modules_to_save: list[str] | None = Field(None, description="modules trained in full; default: the new head")

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty; name modules, or use all-linear")
        if self.init_lora_weights is False:
            raise ValueError("init_lora_weights: false is PEFT's debugging mode; use true, gaussian or orthogonal")
        return self

    @property
    def init(self) -> str:
        """How a fresh A is drawn."""
        return "kaiming" if self.init_lora_weights is True else str(self.init_lora_weights)


class TrainingConfig(Section):
    """Local training, under the Trainer's names."""

    learning_rate: float = Field(1e-3, gt=0)
    round_decay: float = Field(1.0, gt=0, le=1, description="learning_rate is multiplied by this after every round")
    per_device_train_batch_size: int = Field(16, ge=1)
    per_device_eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    num_train_epochs: float = Field(1, gt=0)
    max_steps: int = Field(-1, ge=-1, description="optimizer steps per round; overrides num_train_epochs")
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    base_dropout: bool = Field(
        True,
        description="false runs the frozen base without its own dropout, a third faster on a CPU; lora_dropout stays",
    )
    cohort_size: int | None = Field(
        None,
        ge=1,
        description="clients that train in one pass over the base, equal to each alone up to rounding; 1 trains each"
        " alone; default: up to 8 (64 on a GPU), as many as memory holds",
    )
    prefix_cache_gb: float = Field(
        1.0,
        ge=0,
        description="memory of each worker for what frozen layers below the lowest adapted one make of a row, which is"
        " computed once; not used where those layers have dropout in training; 0 turns it off",
    )
    group_by_length: bool = Field(True, description="batches of rows of similar length, so that padding is short")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.max_steps == 0:
            raise ValueError("max_steps is -1 (use num_train_epochs) or at least 1")
        return self


class EvaluationConfig(Section):
    """When the server looks; the last round is always scored."""

    every: int = Field(1, ge=1, description="rounds between evaluations")
    at_start: bool = Field(True, description="score the model before the first round too")
    per_client: bool = Field(True, description="score the global model on every client's held-out rows too")
    max_rows_per_client: int | None = Field(64, ge=1)
    probe: DataConfig | None = Field(
        None,
        description="rows of another kind that nobody trains on, scored whenever the model is: what it could do before."
        " Perplexity of a language model; of a classifier, how well its features tell these labels apart",
    )


class AdmissionConfig(Section):
    """What an update must satisfy beyond the exact shapes that were asked for."""

    max_update_norm: float = Field(1e4, gt=0, description="Frobenius norm of a client's change")


def _read_attackers(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    if isinstance(value, list) and value and all(isinstance(client, str) for client in value):
        return value
    raise ValueError(f"expected a share of the clients above 0 and below 1, or a list of client ids, not {value!r}")


class AttackConfig(Section):
    """Hostile clients, simulated; see ``clients.attacks``."""

    name: str = Field(description="label_flip, sign_flip, scaled_update, gaussian, nan, alie, free_rider, or a plug-in")
    options: dict[str, Any] = Field({}, description="numbers of the attack, such as {scale: 4}")
    clients: Annotated[float | list[str], BeforeValidator(_read_attackers)] = Field(
        0.2, description="who attacks: a share of the federation, drawn from the seed, or client ids"
    )


class LedgerConfig(Section):
    """Patches of the base, for the strategies that make them."""

    max_rank: int | None = Field(
        None, ge=1, description="rank per module the patches are recompressed to; default: only where nothing is lost"
    )


class ScheduleConfig(Section):
    """When a round closes, and what becomes of updates that come later."""

    mode: Literal["sync", "async"] = Field(
        "sync", description="async keeps clients.per_round clients busy and aggregates every `buffer` updates (FedBuff)"
    )
    over_selection: float = Field(
        1.0, ge=1, description="sync: ask this many times clients.per_round; the round closes with the first ones"
    )
    deadline_s: float | None = Field(
        None, gt=0, description="seconds after which a round closes with what it has; async: that a client may take"
    )
    quorum: float = Field(
        0.0, ge=0, le=1, description="share of clients.per_round whose updates a round needs, else it changes nothing"
    )
    late: Literal["drop", "keep"] = Field(
        "drop", description="keep: an update that misses its round counts in a later one (wants the staleness wrapper)"
    )
    max_staleness: int = Field(
        20, ge=1, description="rounds after which a client that still has not answered is given up"
    )
    buffer: int = Field(10, ge=1, description="async: updates per aggregation")


def _read_distribution(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, list):
        if not value or not all(_positive(number) for number in value):
            raise ValueError(f"expected positive numbers, not {value}")
        return [float(number) for number in value]
    shapes = {"uniform": ("low", "high"), "lognormal": ("median", "sigma")}
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in shapes:
        kind, options = next(iter(value.items()))
        if isinstance(options, dict) and set(options) == set(shapes[kind]) and all(map(_positive, options.values())):
            return {kind: {name: float(number) for name, number in options.items()}}
    raise ValueError(
        "expected a number, a list of numbers (dealt to clients in turn), {uniform: {low: 10, high: 100}} or"
        " {lognormal: {median: 50, sigma: 1}}"
    )


def _positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")


Distribution = Annotated[list[float] | dict[str, dict[str, float]], BeforeValidator(_read_distribution)]


class FleetConfig(Section):
    """Simulated devices: rounds are timed by a virtual clock, and nothing waits for them."""

    examples_per_s: Distribution = Field(
        {"lognormal": {"median": 50.0, "sigma": 0.8}}, description="training speed of each client"
    )
    mbit_per_s: Distribution = Field(
        {"lognormal": {"median": 20.0, "sigma": 0.8}}, description="bandwidth of each client, up and down alike"
    )
    jitter: float = Field(0.0, ge=0, description="sigma of a lognormal factor on every single task")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a client that was asked never answers")
    online: float = Field(1.0, gt=0, le=1, description="share of the time a client is there to be asked")
    period_s: float = Field(3600.0, gt=0, description="each client comes and goes once in this time, at its own phase")


class StoreConfig(Section):
    """Who may write the run folder, and where others can look on. The run folder itself stays the truth."""

    redis: str | None = Field(
        None, description="redis://host:port/0 for the run's lease, events and client registry; default: $FEDLORA_REDIS"
    )
    lease_s: float = Field(10.0, ge=1, description="a silent orchestrator's run may be taken over after this time")


class WireConfig(Section):
    """How the changes of clients travel to the server; what travels down, and extra tensors, stay float32."""

    up: Literal["fp32", "int8", "int4"] = Field(
        "fp32", description="int8 and int4 round values to 255 or 15 levels per rank component or row"
    )
    top_k: float | None = Field(
        None, gt=0, lt=1, description="only this share of the values of each tensor travels, the largest; default all"
    )
    error_feedback: bool = Field(
        False, description="what rounding and top_k take from an update, the client keeps and adds to its next one"
    )

    @model_validator(mode="after")
    def _check(self) -> WireConfig:
        if self.error_feedback and self.up == "fp32" and self.top_k is None:
            raise ValueError("error_feedback has nothing to feed back: up: fp32 loses nothing; use int8, int4 or top_k")
        return self


class ContributionsConfig(Section):
    """The contribution log: what every aggregation was given, kept so that it can be done again without somebody."""

    keep_rounds: int | None = Field(None, ge=1, description="only the last so many rounds stay; default all")
    every: int = Field(1, ge=1, description="log every so many rounds only")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the clients' changes; float16 takes half the place and rounds them"
    )


class RayConfig(Section):
    """The Ray pool."""

    address: str | None = Field(None, description="of a running cluster; default: $RAY_ADDRESS, else start one here")
    workers: int | None = Field(None, ge=1, description="default: as many as num_cpus lets the cluster hold")
    num_cpus: float = Field(1, gt=0, description="cores each worker reserves")
    num_gpus: float = Field(0, ge=0, description="share of a GPU each worker reserves")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="custom resources each worker reserves, as nodes were started with"
    )
    task_retries: int = Field(1, ge=0, description="times a task is given to another worker when its worker dies")
