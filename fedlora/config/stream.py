"""The sections of a configuration that say what a stream of tasks is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fedlora.config.sections import DataConfig, Section
from fedlora.errors import nearest

Rule = str | dict[str, dict[str, Any] | None]


class StreamTaskConfig(Section):
    """One task of a stream: any dataset, or some rows of one."""

    name: str
    data: DataConfig | None = Field(None, description="its rows; what is not given here is as in the run's data")
    labels: list[str] | None = Field(None, min_length=1, description="only rows with these labels")
    where: dict[str, list[str]] = Field({}, description="only rows with these values: {column: [value, ...]}")
    prefix: bool = Field(False, description="its labels become name/label: the same word means another thing elsewhere")
    rounds: int | None = Field(None, ge=1, description="default continual.rounds")
    until: Rule | None = Field(None, description="default continual.until")


class ReplayConfig(Section):
    """Rows of earlier tasks that every client keeps and goes on training on."""

    rows: int = Field(50, ge=1, description="of each client's buffer, over all earlier tasks")
    balanced: bool = Field(False, description="as many rows of each label; else every row is as likely to stay")
    hard: bool = Field(
        False, description="keep four times as many, and train on those that the received model finds hardest"
    )


class LiveConfig(Section):
    """Rows that go on coming in while the run trains on them."""

    source: str = Field(description="a folder of JSONL files, or redis://host:6379/0#key, a list of rows as JSON")
    rows: int = Field(ge=1, description="of a round: it begins once so many more have come")
    window: int = Field(1, ge=1, description="rounds whose rows clients train on, the present one included")
    by: str | None = Field(None, description="column that names a row's client; default: dealt to clients in turn")
    clients: list[str] | None = Field(None, min_length=1, description="with by: the names of all clients")
    patience_s: float = Field(60.0, ge=0, description="how long a round waits for its rows before the run ends")

    @model_validator(mode="after")
    def _check(self) -> LiveConfig:
        if bool(self.by) != bool(self.clients):
            raise ValueError("by and clients belong together: a column, and every client it may name")
        return self


class ContinualConfig(Section):
    """Tasks that come one after the other."""

    tasks: list[StreamTaskConfig] = Field([], description="in the order in which they come")
    split: int | None = Field(
        None, ge=2, description="instead of tasks: divide the label set into so many, in an order drawn from the seed"
    )
    live: LiveConfig | None = Field(None, description="instead of tasks: one stream whose end nobody knows")
    rounds: int = Field(5, ge=1, description="rounds of a task that does not say")
    scenario: Literal["class", "task", "domain"] = Field(
        "class",
        description="what a test row is scored against: all labels met so far (class), those of its own task (task);"
        " domain: every task has the same labels",
    )
    loss_labels: Literal["task", "met", "all"] = Field(
        "task", description="labels that compete in a client's loss: those of its present task, of all it has met, all"
    )
    order: Literal["same", "shuffled"] = Field(
        "same", description="shuffled: every client meets tasks in its own order"
    )
    stagger: int = Field(0, ge=0, description="rounds by which clients may be behind, drawn once per client")
    blur: float = Field(
        0.0, ge=0, le=0.5, description="share of a task's rows that a client meets with a neighbouring task"
    )
    until: Rule | None = Field(
        None,
        description="end a task before its rounds are over, once its loss has settled: plateau or published, with"
        " options as {plateau: {window: 5}}; rounds is then the most a task takes",
    )
    freeze: Rule = Field(
        "boundaries",
        description="when the adapter goes into the base ledger and a fresh one starts: boundaries, plateau, published,"
        " period or never; with options as {plateau: {window: 5}}",
    )
    merge: Rule = Field(
        "sum",
        description="how the frozen tasks become one model: sum, mean, ties, dare, orthogonal or lines; with options as"
        " {lines: {alpha: 0.5}}",
    )
    isolated: bool = Field(False, description="every task trains an adapter and a head of its own, from the bare base")
    routing: Literal["key", "prototype"] = Field(
        "key",
        description="isolated: a row is scored with the adapter of its own task (key), or of the one whose mean feature"
        " under the bare base is nearest (prototype)",
    )
    replay: ReplayConfig | None = Field(None, description="a buffer on every client; {} for the defaults")
    joint: bool = Field(False, description="the upper bound: everybody trains on the rows of all tasks all the time")
    without: list[str] = Field(
        [],
        description="names of tasks whose rounds are left out; all other rounds keep their numbers, and labels, splits"
        " and draws stay as they are",
    )

    @model_validator(mode="after")
    def _check(self) -> ContinualConfig:
        if bool(self.tasks) + bool(self.split) + bool(self.live) != 1:
            raise ValueError("continual needs tasks, or split: a number of tasks to divide the label set into, or live")
        if self.live:
            self._check_live()
        if self.replay and not self.live and self.loss_labels == "task" and self.scenario != "domain":
            raise ValueError("replay brings rows of earlier tasks, whose labels must compete: use loss_labels: met")
        if self.joint:
            idle = {"order": "same", "stagger": 0, "blur": 0.0, "replay": None, "merge": "sum", "isolated": False}
            idle |= {"until": None}
            if ignored := [key for key, default in idle.items() if getattr(self, key) != default]:
                raise ValueError(f"joint trains on the rows of all tasks all the time; leave {', '.join(ignored)} out")
            if self.freeze != "never":
                raise ValueError("joint knows no boundaries; set freeze: never")
        if self.isolated:
            self._check_isolated()
        elif self.routing != "key":
            raise ValueError("routing chooses among adapters of isolated tasks; set isolated: true, or leave it out")
        if odd := [task.name for task in self.tasks if task.prefix and task.data is None]:
            raise ValueError(f"prefix tells the labels of datasets apart, and task {odd[0]} has no data of its own")
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks have the name {twice[0]}; names tell scores apart")
        if self.without:
            self._check_without()
        return self

    def _check_without(self) -> None:
        if self.live:
            raise ValueError("without: a live stream has no tasks that could be left out; take out clients or records")
        if odd := next((name for name in self.without if name not in self.names), None):
            raise ValueError(f"without: there is no task {odd}{nearest(odd, self.names)}")
        if set(self.without) >= set(self.names):
            raise ValueError(f"without leaves no task to train; the stream has {', '.join(self.names)}")
        mixed = {"order": "same", "stagger": 0, "blur": 0.0, "joint": False}
        if keys := [key for key, default in mixed.items() if getattr(self, key) != default]:
            raise ValueError(
                f"without leaves out the rounds of a task, and with {', '.join(keys)} its rows are trained on in rounds"
                " of other tasks too; leave out its rows instead (data.forget, fedlora unlearn --data or --class)"
            )

    def _check_live(self) -> None:
        told = {"order": "same", "stagger": 0, "blur": 0.0, "merge": "sum", "isolated": False, "joint": False}
        told |= {"until": None}
        if odd := [key for key, default in told.items() if getattr(self, key) != default]:
            raise ValueError(f"a live stream has no tasks that are known before; leave {', '.join(odd)} out")
        if self.freeze == "boundaries" or (isinstance(self.freeze, dict) and "boundaries" in self.freeze):
            raise ValueError("a live stream has no boundaries; use freeze: plateau, published, period or never")

    def _check_isolated(self) -> None:
        shared = {"order": "same", "stagger": 0, "blur": 0.0, "replay": None}
        if mixing := [key for key, default in shared.items() if getattr(self, key) != default]:
            raise ValueError(f"isolated trains one task at a time, on its rows only; leave {', '.join(mixing)} out")
        if self.merge != "sum":
            raise ValueError("isolated keeps the tasks apart, so there is nothing to merge; leave merge out")
        if self.freeze != "boundaries" and (isinstance(self.freeze, str) or set(self.freeze) != {"boundaries"}):
            raise ValueError("isolated begins an adapter where a task begins; use freeze: boundaries")
        # each task leaves a folder of its name beside the files of the adapter
        if odd := [name for name in self.names if name in ("", ".", "..") or set(name) & set('/\\:*?"<>|\0')]:
            raise ValueError(f"isolated writes adapter/<task>, and {odd[0]!r} is no name of a folder")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks, in stream order."""
        if self.split:
            return tuple(f"task{place + 1}" for place in range(self.split))
        return ("live",) if self.live else tuple(task.name for task in self.tasks)

    @property
    def present(self) -> tuple[int, ...]:
        """Places in ``names`` of the tasks that are not left out."""
        return tuple(place for place, name in enumerate(self.names) if name not in self.without)

    @property
    def task_rounds(self) -> tuple[int, ...]:
        """Rounds of each task, those that are left out included."""
        if self.split:
            return (self.rounds,) * self.split
        if self.live:
            return (self.rounds,)
        return tuple(task.rounds or self.rounds for task in self.tasks)

    @property
    def stops(self) -> tuple[Rule | None, ...]:
        """The rule that may end each task before its rounds are over."""
        if self.split:
            return (self.until,) * self.split
        if self.live:
            return (None,)
        return tuple(task.until or self.until for task in self.tasks)
