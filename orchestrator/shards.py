"""A run of shards: its clients are dealt into groups that never learn from each other, and the models are combined.

Every shard is an ordinary run in ``shards/<n>`` of the run folder. What a client taught is in the model of its shard
and, by way of that, in the combination: to take the client out, one shard is played again and all are combined anew.

Source: SISA training (Bourtoule et al., 2021, arXiv 1912.03817), with clients in the place of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.adapter.state import AdapterState
from fedlora.aggregation import compose
from fedlora.aggregation.base import Contribution, RoundContext
from fedlora.aggregation.combine import combine
from fedlora.config import DataConfig, RunConfig, parse_config
from fedlora.data.partition import Corpus, hash_of, name_column, open_corpus
from fedlora.errors import ConfigError, RunFolderError, RunInterrupted
from fedlora.protocol import BaseInfo, ClientInfo
from fedlora.seeds import derive_seed
from orchestrator.checkpoint import load_latest
from orchestrator.federation import Emit, Federation
from orchestrator.opening import check_base, check_named
from orchestrator.results import whole_adapter
from orchestrator.scoring import evaluate_global
from orchestrator.state import RunState, Totals
from orchestrator.stores.files import SHARDS, read_json, read_lines, shard_folders

_SUMS = ("bytes_up", "bytes_down", "train_tokens", "dropped_rows", "in_flight")


def deal(clients: Collection[str], shards: int, seed: int) -> list[list[str]]:
    """The clients of every shard: a seeded draw into groups whose sizes differ by one at most.

    Args:
        clients: all that are registered, those that are excluded too, so that excluding one moves nobody.
    """
    drawn = sorted(clients, key=lambda client: (derive_seed(seed, 0, client, "shard"), client))
    return [drawn[number::shards] for number in range(shards)]


def shard_configs(config: RunConfig) -> dict[int, RunConfig]:
    """The configuration of every shard that has a client left, by number: the run's, and everybody else excluded.

    Only what concerns a shard is in its configuration: of ``data.forget`` the rows that its clients have. So taking
    something out of one shard leaves the others the very runs they were.

    Raises:
        ConfigError: for fewer clients than shards, and for names of clients that are not there.
        DataError: if the rows cannot be read.
    """
    everything = config.data.model_copy(update={"forget": []})
    corpus = open_corpus(everything, config.clients.count, config.seed, config.model.task)
    clients, shards = list(corpus.shards), config.federation.shards
    check_named(config, clients)
    if len(clients) < shards:
        raise ConfigError(
            f"federation.shards: {len(clients)} clients cannot be dealt into {shards} shards; lower it, or have more"
            " clients"
        )
    found = {}
    for number, own in enumerate(deal(clients, shards, config.seed)):
        left = set(own) - set(config.clients.exclude)
        if not left:
            continue
        content = config.resolved()
        content["name"] = f"{config.name or 'run'}/{SHARDS}/{number}"
        content["output_dir"] = str(Path(config.output_dir) / SHARDS / str(number))
        content["federation"]["shards"] = 1
        content["clients"]["exclude"] = sorted({*clients, *config.clients.exclude} - left)
        content["data"]["forget"] = _forgotten_by(own, corpus, config.data)
        found[number] = parse_config(content)
    return found


def play_shards(
    config: RunConfig, folder: Path, emit: Emit, play: Callable[[int, RunConfig], Mapping[str, Any] | None]
) -> None:
    """Play the shards one after the other.

    Args:
        play: plays one to its end and returns its summary; None where it had finished before.

    Raises:
        RunInterrupted: what is committed stays, and resuming the run goes on with the shard.
        FedLoRAError: as of ``shard_configs``, and what a run may raise.
    """
    for number, part in shard_configs(config).items():
        try:
            summary = play(number, part)
        except RunInterrupted as error:
            raise RunInterrupted(f"shard {number}: {error}; for the whole run: fedlora resume {folder}") from error
        if summary:
            emit("shard_finished", {"shard": number, "shards": config.federation.shards, "final": summary["final"]})


def combined(config: RunConfig, folder: Path, fed: Federation, base: BaseInfo) -> tuple[RunState, list[dict[str, Any]]]:
    """The state of a run whose shards have all finished, and its metrics rows, one per round; only the last is scored.

    Raises:
        RunFolderError: if a shard was trained on another base.
    """
    states, told = [], {}
    for number, part in shard_folders(folder).items():
        state = _last_state(part)
        check_base(state, base, part)
        states.append(state)
        told[str(number)] = _describe(part, state)
    rows = _merged_rows([read_lines(part / "metrics.jsonl") for part in shard_folders(folder).values()])
    totals = Totals(wall_s=sum(state.totals.wall_s for state in states))
    for row in rows:
        totals = totals.plus(row)
    state = RunState(
        round=config.rounds,
        adapter=mean_adapter(config, shard_folders(folder).values()),
        strategy={},
        config_sha256=config.sha256(),
        base_fingerprint=base.fingerprint,
        totals=totals,
        initial=states[0].initial,
        participation=dict(sorted(item for state in states for item in state.participation.items())),
        clock_s=max(state.clock_s for state in states),
    )
    found = evaluate_global(fed, state)
    rows[-1] |= {"eval": found.scores, "clients": found.spread, "shards": told}
    last = {"round": state.round, **found.scores}
    return replace(state, row=rows[-1], last=last, best=last), rows


def mean_adapter(config: RunConfig, parts: Iterable[Path]) -> AdapterState:
    """``flexlora`` over finished shards: the mean of what they add to the base, weighted as clients are in a round.

    Its rank is the largest that one of them needs. Tensors trained in full are averaged.
    """
    updates = []
    for place, part in enumerate(parts):
        adapter, members = whole_adapter(_last_state(part)), read_json(part / "partition.json")
        rows = sum(member["num_examples"] for member in members)
        weight = rows if config.weighting == "examples" else len(members)
        updates.append(Contribution(ClientInfo(f"{place:06d}", adapter.rank, rows), weight, adapter, adapter))
    ctx = RoundContext(config.rounds, max(update.client.rank for update in updates), config.seed)
    return combine(compose("flexlora"), updates, ctx, {}).adapter


def _last_state(part: Path) -> RunState:
    state, _ = load_latest(part)
    if state is None:
        raise RunFolderError(f"{part} has no checkpoint; go on with: fedlora resume {part}")
    return state


def _describe(part: Path, state: RunState) -> dict[str, Any]:
    """A shard in the summary of its run."""
    members, summary = read_json(part / "partition.json"), read_json(part / "summary.json")
    names, rows = [member["client"] for member in members], sum(member["num_examples"] for member in members)
    return {"clients": names, "rows": rows, "final": state.last, "adapter_sha256": summary["adapter_sha256"]}


def _forgotten_by(clients: Collection[str], corpus: Corpus, data: DataConfig) -> list[str]:
    """Of the names of rows that are left out, those of rows that these clients have."""
    if not data.forget:
        return []
    names = corpus.train[name_column(corpus.train, data)][:]
    rows = {row for client in clients for held in (corpus.shards, corpus.heldout) for row in held[client]}
    return sorted(set(data.forget) & {hash_of(names[row]) for row in rows})


def _merged_rows(shards: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The metrics rows of the shards as if their rounds of one number had been one round."""
    return [_merged(rows) for rows in zip(*shards, strict=True)]


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def counted(key: str) -> dict[str, float]:
        return dict(sum((Counter(row[key]) for row in rows), Counter()))

    def lists(key: str) -> list[str]:
        return [client for row in rows for client in row[key]]

    learned = [(len(row["admitted"]), row["train"]) for row in rows if row["train"]]
    count = sum(number for number, _ in learned)
    problems = [row["problem"] for row in rows if row["problem"]]
    clocks = [row["clock_s"] for row in rows if row["clock_s"] is not None]
    return {
        "round": rows[0]["round"],
        "selected": lists("selected"),
        "admitted": lists("admitted"),
        **{key: {c: why for row in rows for c, why in row[key].items()} for key in ("refused", "failed", "late")},
        **{key: sum(row[key] for row in rows) for key in _SUMS},
        "train": {name: sum(n * one[name] for n, one in learned) / count for name in learned[0][1]} if count else None,
        **{key: counted(key) for key in ("staleness", "ranks", "seconds")},
        "problem": "; ".join(problems) or None,
        "eval": None,
        "clients": None,
        "strategy": {},
        "clock_s": max(clocks, default=None),
    }
