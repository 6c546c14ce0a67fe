"""What is fixed before the first round: the federation of a configuration on a pool, and the state it starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clients.attacks import mount
from fedlora.adapter.initial import check_rank, initial_adapter
from fedlora.adapter.packing import Packing
from fedlora.aggregation import compose
from fedlora.aggregation.combine import serve_ranks
from fedlora.config import RunConfig
from fedlora.continual.course import Course
from fedlora.continual.merging import build_merging
from fedlora.continual.plateau import build_policy, build_stop
from fedlora.data.live import LiveStream
from fedlora.errors import ConfigError, RunFolderError, nearest
from fedlora.protocol import BaseInfo, ClientInfo, ClientPool
from fedlora.seeds import derive_seed
from orchestrator.federation import Emit, Federation
from orchestrator.fleet import Fleet
from orchestrator.forgetting import check_forgetting
from orchestrator.local_privacy import local_spending
from orchestrator.pools.cohorts import cohort_size
from orchestrator.privacy import spending, told
from orchestrator.progress import Progress
from orchestrator.scoring import evaluate_global
from orchestrator.selection import build_selector
from orchestrator.soundness import check_head, check_strategy, check_stream
from orchestrator.state import RunState
from orchestrator.summing import summing


def open_federation(config: RunConfig, pool: ClientPool, emit: Emit) -> tuple[Federation, BaseInfo]:
    """What stays the same from round to round, checked as a whole before anything is trained.

    Raises:
        ConfigError: for parts of a configuration that do not fit each other, the data or the model.
    """
    strategy = compose(config.strategy)
    members = pool.members()
    configured = {member.id: member.rank for member in members}
    ranks, rank = serve_ranks(strategy, configured, config.lora.r)
    if ranks != configured:
        emit("ranks_equalised", {"strategy": config.strategy_name, "rank": rank})
    members = [replace(member, rank=ranks[member.id]) for member in members]
    base = pool.base()
    if config.pool != "flower" and not config.data.test_fraction and not (config.data.test_file or config.data.name):
        raise ConfigError("data.test_fraction is 0 and there is no data.test_file: nothing to score the model on")
    check_named(config, [member.id for member in members], strategy.required, strategy.name)
    check_strategy(strategy, config, [member.id for member in members], base.merges)
    check_stream(strategy, members)
    check_head(strategy, base.dense)
    if config.forgetting:
        check_forgetting(strategy, config, [member.id for member in members])
    private = spending(strategy, config, len(members))
    if private:
        emit("privacy_planned", told(private))
    local = local_spending(strategy, config, len(members))
    if local:
        emit("local_privacy_planned", {"text": local.words(), "delta": local.accountant.delta})
    heaviest = max(member.num_examples for member in members)
    if sums := summing(strategy, config, ranks, heaviest):
        emit("secure_sum_planned", {**asdict(sums), "text": sums.words()})
    check_rank(base.sites, rank)
    merging = build_merging(config.continual.merge) if config.continual else None
    if merging:
        merging.check(base.sites)
    assault = mount(config.attack, [member.id for member in members], len(base.labels), config.seed)
    if assault:
        emit("attackers", {"attack": assault.name, "clients": list(assault.group)})
    fresh = initial_adapter(base.sites, base.dense, rank, config.seed, config.lora.init)
    for stats in pool.stats():
        emit("worker_ready", asdict(stats))
    emit("cohorts", {"clients": cohort_size(config, base), "alone": base.alone})
    course = Course.of(config.continual, config.seed) if config.continual else None
    stops = [config.continual.stops[place] for place in config.continual.present] if config.continual else []
    fed = Federation(
        pool=pool,
        strategy=strategy,
        members=members,
        fresh=fresh,
        seed=config.seed,
        rounds=course.total if course else private.fits if private else config.rounds,
        rank=rank,
        per_round=config.clients.per_round,
        weighting=config.weighting,
        max_update_norm=config.admission.max_update_norm,
        packing=Packing(config.wire.up, config.wire.top_k),
        masked=config.privacy.secure_sum is not None,
        evaluate_every=config.evaluation.every,
        evaluate_clients=config.evaluation.per_client,
        ledger_rank=config.ledger.max_rank,
        emit=emit,
        selector=build_selector(config.clients.selection),
        schedule=config.schedule,
        training=config.training,
        fleet=Fleet.of(config.fleet, members, config.seed) if config.fleet else None,
        course=course,
        excluded=frozenset(config.clients.exclude),
        joins=dict(config.clients.joins),
        live=_live(config),
        stops=[build_stop(rule) if rule else None for rule in stops],
        freezer=build_policy(config.continual.freeze) if config.continual else None,
        merging=merging,
        isolated=bool(config.continual and config.continual.isolated),
        prototypes=bool(config.continual and config.continual.routing == "prototype"),
        init=config.lora.init,
        probe=base.task if config.evaluation.probe else "",
        forgetting=config.forgetting,
        spending=private,
        local=local,
    )
    if fed.fleet:
        emit("fleet", fed.fleet.describe())
    return fed, base


def first_state(config: RunConfig, fed: Federation, base: BaseInfo) -> RunState:
    """The state before the first round, scored unless the configuration leaves that out."""
    skipped = fed.following(0) - 1  # of isolated tasks each has its own start, whichever of them are left out
    seed = derive_seed(config.seed, skipped, "", "start") if skipped and fed.isolated else config.seed
    state = RunState(
        round=0,
        adapter=fed.strategy.start(fed.fresh_pair(0, 0), seed),
        strategy={},
        config_sha256=config.sha256(),
        base_fingerprint=base.fingerprint,
    )
    if not config.evaluation.at_start:
        return state
    found = evaluate_global(replace(fed, evaluate_clients=False), state)
    stream = Progress().begun(found.tasks) if found.tasks else None
    return replace(state, initial=found.scores, stream=stream)


def _live(config: RunConfig) -> LiveStream | None:
    if config.continual is None or config.continual.live is None:
        return None
    from clients.live import open_live  # reads rows, which a driver whose clients are elsewhere never does

    return open_live(config)


def check_named(config: RunConfig, clients: Sequence[str], required: Collection[str] = (), strategy: str = "") -> None:
    """Raise ``ConfigError`` where clients are named that are not there, or that a run cannot do without."""
    for key, named in (("exclude", config.clients.exclude), ("joins", list(config.clients.joins))):
        if odd := next((client for client in named if client not in clients), None):
            raise ConfigError(f"clients.{key}: there is no client {odd}{nearest(odd, clients)}")
    if not set(clients) - set(config.clients.exclude):
        raise ConfigError("clients.exclude leaves no client to train")
    if needed := sorted(set(config.clients.exclude) & set(required)):
        raise ConfigError(f"clients.exclude: {strategy} cannot do without {needed[0]}, which it trusts")


def rounds_of(config: RunConfig, state: RunState) -> int:
    """Rounds of a run that has come so far; tasks of a stream may have ended early."""
    if config.continual is None or state.stream is None:
        return config.rounds
    return Course.of(config.continual, config.seed).after(state.stream.ended).total


def check_base(state: RunState, base: BaseInfo, folder: Path) -> None:
    """Raise ``RunFolderError`` where a run would go on with another model than it started with."""
    if state.base_fingerprint != base.fingerprint:
        raise RunFolderError(
            f"{folder}: the base model is not the one this run started with (fingerprint {base.fingerprint[:12]},"
            f" expected {state.base_fingerprint[:12]}); restore it, or start a new run"
        )


def describe_members(members: Sequence[ClientInfo]) -> dict[str, Any]:
    """The partition in a few numbers: clients, rows, ranks."""
    rows = sorted(member.num_examples for member in members)
    counts = Counter(member.rank for member in members)
    return {
        "count": len(rows),
        "rows": sum(rows),
        "smallest": rows[0],
        "median": rows[len(rows) // 2],
        "largest": rows[-1],
        "ranks": {str(rank): counts[rank] for rank in sorted(counts)},
    }
