"""The runtime every pool shares: one base model, many clients, tasks in, updates out."""

from __future__ import annotations

import contextlib
import os
import random
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedlora.continual.distillation
import fedlora.continual.importance
import fedlora.continual.orthogonal
import fedlora.continual.prototypes
import fedlora.continual.subspace  # noqa: F401 - these register their local methods
from clients.attacks import Assault, mount
from clients.forget import rows_to_forget
from clients.lesson import Learned, Lesson, with_personal
from clients.noise import LocalNoise
from clients.private_state import Private, PrivateState
from clients.probe import Probe
from clients.rows import ClientRows
from clients.secure import SecureClient
from clients.specs import adapter_spec, base_spec, task_of
from clients.stopwatch import Stopwatch
from fedlora.adapter.ledger import frozen
from fedlora.adapter.packing import Packing
from fedlora.adapter.peft import extract, insert
from fedlora.adapter.rank import pad
from fedlora.adapter.wire import decode_adapter, decode_parcel, decode_update, encode_update
from fedlora.aggregation.combine import make_delta
from fedlora.config import ForgettingConfig, RunConfig, TrainingConfig
from fedlora.data.partition import Corpus
from fedlora.data.text import Encoded, Example, encode
from fedlora.errors import DataError, FedLoRAError, SecureSumError
from fedlora.plugins import load_plugins
from fedlora.protocol import PARTS, BaseInfo, ClientInfo, EvalResult, EvalTask, TrainPlan, TrainTask, WorkerStats
from fedlora.seeds import derive_seed
from fedlora.training.batches import steps_of
from fedlora.training.capacity import clients_per_pass, longest
from fedlora.training.cohort import train_cohort
from fedlora.training.evaluate import HARD_POOL, evaluate, hardest
from fedlora.training.features import features, nearest
from fedlora.training.loop import LocalResult, train
from fedlora.training.methods import Answer, Local, MethodStack, fitted, name_parameters, start_from
from fedlora.training.model import AdaptedModel, Base, adapter_name, check_length, load_base
from fedlora.training.stacked import why_not
from fedlora.unlearning.forgetting import ForgetWork, unlearn
from fedlora.unlearning.recipe import recipe_of


class ClientRuntime:
    """Executes tasks of any client of a run against one copy of the base model."""

    def __init__(self, config: RunConfig, threads: int | None = None):
        self._config = config
        load_plugins(config.plugins)
        if threads:
            torch.set_num_threads(threads)
        self.rows = ClientRows(config, self._encode)
        self.base_loads = 0
        self._watch = Stopwatch()
        self._adapted: AdaptedModel | None = None
        self._probe = Probe(config)
        self._features: dict[tuple[str, str, int | None], Tensor] = {}
        self._assault = mount(config.attack, list(self.corpus.shards), len(self.corpus.labels), config.seed)
        self._shared: dict[tuple[int, str, str], Learned] = {}  # honest deltas of colluders, of one round
        private = Path(config.output_dir).absolute() / "private"
        self._private = PrivateState(private, config.keep_checkpoints)
        self._noise, self._secure = LocalNoise.of(config, private), SecureClient.of(config, private)

    def members(self) -> list[ClientInfo]:
        """Every client of the run, with its rank and what it holds."""
        return self.rows.members()

    @property
    def corpus(self) -> Corpus:
        """Every row of the run."""
        return self.rows.corpus

    def base(self) -> BaseInfo:
        """The base model that all clients share."""
        adapted = self._model()
        info, model = adapted.info(), adapted.at_rank(1)
        if alone := why_not(model, adapter_name(1)):
            return replace(info, alone=alone)
        name_parameters(model, adapter_name(1), PARTS)
        training = self._config.training
        rank = max((member.rank for member in self.members()), default=self._config.lora.r)
        size = rank * sum(out + into for out, into in info.sites.values()) + sum(t.numel() for t in info.dense.values())
        row = longest(model, self._config.data.max_length, not info.labels, training.base_dropout, adapted.base.device)
        fits = clients_per_pass(row, training.per_device_train_batch_size, size, adapted.base.device)
        return replace(info, cohort=fits)

    def train(self, task: TrainTask) -> bytes:
        """Execute one task.

        Returns:
            Wire bytes of a ``ClientUpdate``.
        """
        assault = self._assault
        with self._watch.on("adapters"):
            if task.forget is not None:
                learned = self._forget(task, self._config.forgetting[task.forget])
            elif assault and task.client in assault.group:
                learned = self._attack(assault, task)
            else:
                learned = self._learn(task)
            return self._answer(task, learned)

    def train_together(self, tasks: Sequence[TrainTask]) -> list[tuple[bytes, float] | None]:
        """Execute tasks of one round with the same ledger and the same trained parts in one pass over the base.

        Returns:
            What ``train`` gives, up to rounding and dropout, and the client's part of the pass, in tokens; None for a
            client that has to be trained alone. What is wrong with it shows then, and costs nobody else.
        """
        with self._watch.on("adapters"):
            return self._train_together(tasks)

    def _train_together(self, tasks: Sequence[TrainTask]) -> list[tuple[bytes, float] | None]:
        lessons: dict[int, Lesson] = {}
        for place, task in enumerate(tasks):
            if self._can_share(task):
                with contextlib.suppress(Exception):
                    lessons[place] = self._begin(task)
        answers: list[tuple[bytes, float] | None] = [None] * len(tasks)
        if len(lessons) < 2:
            return answers
        adapted, first = self._model(), next(iter(lessons.values()))
        adapted.patch_base(first.task.ledger)  # what does not fit a client's rank is among its tensors
        which = adapted.at_rank(first.task.plan.rank), first.adapter
        members = [lesson.member() for lesson in lessons.values()]
        with self._watch.on("train"):
            found = train_cohort(*which, members, first.begun.trained, first.options, first.local.pad_token_id)
        for (place, lesson), trained in zip(lessons.items(), found, strict=True):
            if trained.result is not None:
                with contextlib.suppress(Exception):
                    lesson.put_back(adapted, trained.tensors)
                    payload = self._answer(lesson.task, lesson.learned(trained.result))
                    answers[place] = payload, float(trained.result.tokens)
        return answers

    def _can_share(self, task: TrainTask) -> bool:
        """Whether a client can be one of a cohort."""
        hostile = self._assault is not None and task.client in self._assault.group
        # whoever waits for its rows waits once, not twice
        return not (
            hostile or self.rows.awaited(task) or task.forget is not None or MethodStack(task.plan.methods).alone
        )

    def _answer(self, task: TrainTask, learned: Learned) -> bytes:
        """Wire bytes of an update; what the client keeps is saved before."""
        if self._noise:
            learned = self._noise.protect(task, learned)
        private, meant = learned.private, learned.delta
        feedback = self._config.wire.error_feedback and task.forget is None
        if feedback:  # what earlier updates left unsent goes with this one, and what this one leaves is kept
            unsent = self._private.load(task.client, task.accepted).unsent
            meant = {name: tensor + fitted(unsent.get(name), tensor) for name, tensor in meant.items()}
        packing = Packing(self._config.wire.up, self._config.wire.top_k)
        told = (meant, learned.rows, learned.metrics, learned.extras, packing)
        if self._secure:
            payload = self._secure.masked(task, meant, learned.rows, learned.metrics)
        else:
            payload = encode_update(task.client, task.round, task.received, *told)
        if feedback:
            sent = decode_update(payload).delta
            private = replace(private, unsent={**unsent, **{name: meant[name] - sent[name] for name in meant}})
        if feedback or _needs_private(task.plan):
            self._private.save(task.client, task.round, private, task.accepted)
        return payload

    def _begin(self, task: TrainTask, examples: Sequence[Example] | None = None) -> Lesson:
        """A client before its first step.

        Args:
            examples: what it trains on; default its own rows.
        """
        adapted = self._model()
        received, extras = decode_parcel(task.adapter)
        methods = MethodStack(task.plan.methods)
        model, name = adapted.at_rank(task.plan.rank), adapter_name(task.plan.rank)
        adapted.patch_base(task.ledger, received.frozen)
        private = self._private.load(task.client, task.accepted) if _needs_private(task.plan) else Private()
        start = with_personal(received, private.personal, task.plan.keep)
        insert(model, name, start)
        parameters = name_parameters(model, name, task.plan.train)
        begun = start_from(start, parameters, adapted.spec.scaling, task.plan.send)
        begun = replace(begun, extras=extras, kept=private.methods, frozen=partial(frozen, task.ledger))
        rows = self.rows.own(task)
        buffer = self._replayed(task, model)
        examples = [*rows.examples, *buffer] if examples is None else examples
        options = self._config.training
        decayed = options.learning_rate * options.round_decay ** (task.round - 1)
        options = options.model_copy(update={"learning_rate": decayed})
        labels = self.rows.competing(task, examples)
        pad_token_id = adapted.base.tokenizer.pad_token_id
        local = Local(model, parameters, examples, pad_token_id, labels, self.rows.earlier_labels(task), task.seed)
        memory = methods.begin(replace(begun, local=local))
        fresh = self._fresh_loss(local, rows.examples) if buffer else None
        seen = len(rows.examples), rows.dropped, fresh
        return Lesson(task, start, begun, local, options, methods, memory, private, *seen)

    def _learn(self, task: TrainTask, examples: Sequence[Example] | None = None, trains: bool = True) -> Learned:
        """What a client comes to, honestly unless told otherwise; nothing is sent or saved.

        Args:
            examples: what it trains on; default its own rows.
            trains: otherwise it only says that it did.
        """
        lesson = self._begin(task, examples)
        if trains:
            with self._watch.on("train"):
                result = train(lesson.work())
            return lesson.learned(result)
        local = lesson.local
        result = _pretend(local.model, local.examples, lesson.options, local.pad_token_id)
        silent = Answer({name: torch.zeros_like(tensor) for name, tensor in lesson.begun.extras.items()})
        return replace(lesson, fresh_loss=None).learned(result, silent)

    def _forget(self, task: TrainTask, asked: ForgettingConfig) -> Learned:
        """What a client comes to that makes rows unlikely, and keeps others; no change where it learned from none."""
        received, extras = decode_parcel(task.adapter)
        unanswered = {name: torch.zeros_like(tensor) for name, tensor in extras.items()}
        places = rows_to_forget(self._config, self.corpus, asked, task.client)
        gone, kept = (self._encode(self.corpus.train.select(rows).to_list(), task.client).examples for rows in places)
        if not gone:
            still = make_delta(received, received, task.plan.send)
            return Learned(still, unanswered, Private(), 1, {"steps": 0, "tokens": 0, "rows": 0})
        adapted = self._model()
        model, name = adapted.at_rank(task.plan.rank), adapter_name(task.plan.rank)
        adapted.patch_base(task.ledger, received.frozen)
        insert(model, name, received)
        parameters = name_parameters(model, name, task.plan.train)
        which = model, parameters, gone, kept, recipe_of(asked), task.seed
        pad_token_id, scaling = adapted.base.tokenizer.pad_token_id, adapted.spec.scaling
        found = unlearn(ForgetWork(*which, pad_token_id, scaling, methods=task.plan.methods, alone=True))
        seen = {key: getattr(found.trained, key) for key in ("loss", "first_loss", "tokens", "rows")}
        delta = make_delta(received, extract(model, name), task.plan.send)
        return Learned(delta, unanswered, Private(), 1, seen | found.metrics())  # how many rows is its own business

    def _attack(self, assault: Assault, task: TrainTask) -> Learned:
        """What an attacker comes to."""
        attack = assault.attack
        own = [*self.rows.own(task).examples, *self._replayed(task)]
        scene = assault.scene(task, lambda: self._honest_deltas(assault, task))
        examples = attack.examples(own, scene)
        if attack.colludes and examples is own:
            learned = self._honest(task)
        else:
            learned = self._learn(task, examples, attack.trains)
        return replace(learned, delta=attack.delta(learned.delta, scene))

    def _honest_deltas(self, assault: Assault, task: TrainTask) -> list[Mapping[str, Tensor]]:
        """Of every attacker, had it stood at this task's start. One that cannot train is left out."""
        deltas = []
        settings = self._config.clients
        absent = {*settings.exclude, *(c for c, first in settings.joins.items() if first > task.round)}
        for client in assault.group:
            if client in absent:
                continue
            with contextlib.suppress(FedLoRAError):
                theirs = assault.task_of(client, task)
                theirs = replace(theirs, stage=self.rows.stage_of(client, task))
                deltas.append(self._honest(theirs).delta)
        return deltas

    def _honest(self, task: TrainTask) -> Learned:
        """What a colluder would send; trained once per round and start, for all colluders of this process."""
        key = (task.round, task.received, task.client)
        if key not in self._shared:
            self._shared = {known: value for known, value in self._shared.items() if known[0] == task.round}
            self._shared[key] = self._learn(task)
        return self._shared[key]

    def exchange(self, client: str, message: bytes) -> bytes:
        """A client's answer to one message of a secure sum.

        Raises:
            SecureSumError: if it refuses, or the run has none.
        """
        if not self._secure:
            raise SecureSumError("this client knows of no secure sum; its configuration has no privacy.secure_sum")
        return self._secure.answer(client, message)

    def evaluate(self, task: EvalTask) -> EvalResult:
        """Score an adapter on a client's held-out rows, or on the server's."""
        with self._watch.on("evaluate"):
            return self._evaluate(task)

    def _evaluate(self, task: EvalTask) -> EvalResult:
        adapted = self._model()
        state = decode_adapter(task.adapter)
        if task.keep:
            try:
                own = self._private.load(task.subject, task.accepted).personal
            except FedLoRAError as error:
                return EvalResult(task.subject, 0.0, 0, 0, 0, error=str(error))
            state = with_personal(state, own, task.keep)
        state = state.map(lambda update: pad(update, state.rank))  # a strategy may give modules different ranks
        model, name = adapted.at_rank(state.rank), adapter_name(state.rank)
        adapted.patch_base(task.ledger, state.frozen)
        insert(model, name, state)
        if task.probe:
            return self._probe.look(model, adapted.base, task)
        try:
            if task.features:
                return self._measured(task, model)
            kind = "heldout" if task.subject else "test"
            examples = self.rows.examples(kind, task.subject, task.stage).examples
        except DataError as error:
            if not task.subject:
                raise
            return EvalResult(task.subject, 0.0, 0, 0, 0, error=str(error))  # costs this client's score only
        rows = list(range(task.shard, len(examples), task.num_shards))
        if task.prototypes:
            places = nearest(self._features_of(kind, task, model), task.prototypes)
            rows = [row for row in rows if places[row] == task.route]
        size, pad_token_id = self._config.training.per_device_eval_batch_size, adapted.base.tokenizer.pad_token_id
        chosen, among = [examples[row] for row in rows], self.rows.scored_among(task)
        return evaluate(model, chosen, size, pad_token_id, adapted.base.device, task.subject, among)

    def _measured(self, task: EvalTask, model: Any) -> EvalResult:
        """The sum of the features of a client's training rows."""
        found = self._features_of("train", task, model).double()
        return EvalResult(task.subject, 0.0, 0, 0, len(found), features=tuple(found.sum(dim=0).tolist()))

    def _features_of(self, kind: str, task: EvalTask, model: Any) -> Tensor:
        """Of rows as the bare base sees them [rows, hidden]; made once, since nothing is ever put into it."""
        key = kind, task.subject, task.stage
        if key not in self._features:
            base, size = self._model().base, self._config.training.per_device_eval_batch_size
            examples = self.rows.examples(*key).examples
            self._features[key] = features(model, examples, size, base.tokenizer.pad_token_id, base.device)
        return self._features[key]

    def stats(self) -> WorkerStats:
        """What this process has used so far."""
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = dict(self._watch.seconds)
        return WorkerStats(os.getpid(), self.base_loads, torch.get_num_threads(), peak_kb / 1024, used)

    def _model(self) -> AdaptedModel:
        if self._adapted is None:
            base = self._load()
            check_length(base.model, self._config.data.max_length)
            settings, corpus = self._config.training, self.corpus
            rows = 0 if self.rows.live else len(corpus.train) + len(corpus.test)  # of live rows there is no end
            memory = settings.prefix_cache_gb * 2**30, rows * self._config.data.max_length
            self._adapted = AdaptedModel(base, adapter_spec(self._config), *memory)
        return self._adapted

    def _load(self) -> Base:
        self.base_loads += 1
        with self._watch.on("load"):
            return load_base(base_spec(self._config, task_of(self._config, self.corpus), self.corpus.labels))

    def _fresh_loss(self, local: Local, rows: Sequence[Example]) -> float:
        """The loss of what was received on a batch of the present task: rows of a buffer say nothing of a change."""
        size = self._config.training.per_device_train_batch_size
        batch = random.Random(derive_seed(local.seed, 0, "", "fresh loss")).sample(rows, min(size, len(rows)))
        device = next(iter(local.parameters.values())).device
        return evaluate(local.model, batch, size, local.pad_token_id, device, labels=local.labels).loss

    def _replayed(self, task: TrainTask, model: Any = None) -> list[Example]:
        """What the client trains on beside its present task: its buffer of earlier ones.

        Args:
            model: as received, which says what is hard; without it, a buffer of hard rows is one of any rows.
        """
        replay = self._config.continual and self._config.continual.replay
        if not replay or task.stage is None:
            return []
        choosing = replay.hard and model is not None
        examples = self.rows.buffer(task, replay.rows * (HARD_POOL if choosing else 1)).examples
        if not choosing or len(examples) <= replay.rows:
            return examples
        base, batch_size = self._model().base, self._config.training.per_device_eval_batch_size
        labels = self.rows.competing(task, examples)
        return hardest(examples, replay.rows, model, batch_size, base.tokenizer.pad_token_id, base.device, labels)

    def _encode(self, rows: Sequence[dict[str, Any]], where: str) -> Encoded:
        corpus, limit = self.corpus, self._config.data.max_length
        tokenizer = self._model().base.tokenizer
        with self._watch.on("tokenise"):
            return encode(rows, corpus.form, tokenizer, limit, corpus.labels, where)


def _needs_private(plan: TrainPlan) -> bool:
    return bool(plan.keep) or MethodStack(plan.methods).keeps


def _pretend(model: Any, examples: Sequence[Example], options: TrainingConfig, pad_token_id: int) -> LocalResult:
    """What an attacker that does not train reports: the work it was asked for, and a loss after a look at a batch."""
    size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    batch = examples[:size]
    seen = evaluate(model, batch, size, pad_token_id, next(model.parameters()).device).loss
    steps = steps_of(len(examples), size, accumulation, options.max_steps, options.num_train_epochs)
    rows = steps * accumulation * min(size, len(examples))
    tokens = rows * sum(len(example.input_ids) for example in batch) // len(batch)
    return LocalResult(steps, tokens, rows, 0.95 * seen, seen)  # a loss that did not fall would give it away
