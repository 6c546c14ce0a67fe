"""Everything that can be known to be wrong with a configuration before it runs, at once."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clients.attacks import build, mount
from clients.live import open_live
from clients.ranks import assign_ranks
from clients.specs import adapter_spec, base_spec, task_of
from fedlora.adapter.initial import check_rank
from fedlora.aggregation import compose
from fedlora.aggregation.combine import serve_ranks
from fedlora.config import RunConfig
from fedlora.continual.merging import build_merging
from fedlora.continual.plateau import build_policy, build_stop
from fedlora.continual.stream import Stream, open_stream
from fedlora.data.live import LiveStream
from fedlora.errors import FedLoRAError
from fedlora.plugins import load_plugins
from fedlora.training.model import check_length, device_of, dtype_of, find_saved, find_sites, outline
from orchestrator.budget import Outline, budget
from orchestrator.console import describe_attack
from orchestrator.local_privacy import local_spending
from orchestrator.opening import check_named
from orchestrator.privacy import spending
from orchestrator.selection import build_selector
from orchestrator.shards import shard_configs
from orchestrator.soundness import check_head, check_shards, check_strategy
from orchestrator.stores.files import check_folder
from orchestrator.summing import summing


def validate(config: RunConfig) -> tuple[dict[str, Any], list[FedLoRAError]]:
    """Read the data, outline the model without its weights, compose the strategy.

    Returns:
        Facts about the run, as far as they could be found, and every problem.
    """
    if config.pool == "flower":
        return _validate_nodes(config)
    facts: dict[str, Any] = {}
    problems: list[FedLoRAError] = []
    strategy = corpus = served = None
    try:
        load_plugins(config.plugins)
        strategy = compose(config.strategy)
    except FedLoRAError as error:
        problems.append(error)
    try:
        read = (config.data, config.continual, config.clients.count, config.seed, config.model.task)
        stream = open_stream(*read)
        corpus = stream.corpus
        rows = sorted(len(shard) for shard in corpus.shards.values())
        facts["rows"] = f"{sum(rows)} to train on, {len(corpus.test)} to test on, form: {corpus.form}"
        facts["clients"] = f"{len(rows)}, with {rows[0]} to {rows[-1]} rows (median {rows[len(rows) // 2]})"
        live = open_live(config, corpus)
        if live:
            facts |= {"rows": f"{len(corpus.test)} to test on, form: {corpus.form}", "clients": str(len(rows))}
        facts |= _stream_facts(stream, live)
        clients = config.clients
        ranks = assign_ranks(list(corpus.shards), clients.ranks, config.lora.r, clients.declared, config.seed)
        check_named(config, list(corpus.shards))
        if config.federation.shards > 1:
            left = [len(corpus.shards) - len(part.clients.exclude) for part in shard_configs(config).values()]
            facts["shards"] = f"{len(left)}, of {min(left)} to {max(left)} clients"
        if strategy is not None:
            check_strategy(strategy, config, list(corpus.shards), merges=_merges(config))
            check_shards(strategy, config)
            if private := spending(strategy, config, len(corpus.shards)):
                facts["privacy"] = private.planned_words()
            if local := local_spending(strategy, config, len(corpus.shards)):
                facts["local"] = local.words()
            ranks, _ = served = serve_ranks(strategy, ranks, config.lora.r)
            if sums := summing(strategy, config, ranks, rows[-1]):
                facts["secure"] = sums.words()
        facts["ranks"] = ", ".join(
            f"{rank} ({count} clients)" for rank, count in sorted(Counter(ranks.values()).items())
        )
    except FedLoRAError as error:
        problems.append(error)
    try:
        facts |= _attack_facts(config, corpus)
    except FedLoRAError as error:
        problems.append(error)
    try:
        told, sites, dense = _model_facts(config, corpus)
        facts |= told
        if strategy is not None and served is not None:
            ranks, rank = served
            outlined = Outline(rank, sites, sum(tensor.numel() for tensor in dense.values()))
            facts["budget"] = budget(strategy, ranks, outlined, config)
            check_head(strategy, dense)
    except FedLoRAError as error:
        problems.append(error)
    try:
        build_selector(config.clients.selection)
        if config.continual:
            build_policy(config.continual.freeze)
            build_merging(config.continual.merge)
            for rule in config.continual.stops:
                if rule:
                    build_stop(rule)
    except FedLoRAError as error:
        problems.append(error)
    try:
        _check_folder(config)
    except FedLoRAError as error:
        problems.append(error)
    return facts, problems


def _validate_nodes(config: RunConfig) -> tuple[dict[str, Any], list[FedLoRAError]]:
    """``validate`` of a run whose rows and ranks are on nodes that have not come yet."""
    facts: dict[str, Any] = {"clients": f"{config.flower.nodes} nodes, who bring rows and ranks"}
    problems: list[FedLoRAError] = []

    def strategy() -> None:
        composed = compose(config.strategy)
        check_strategy(composed, config, composed.required, merges=_merges(config))
        if private := spending(composed, config, config.flower.nodes):
            facts["privacy"] = private.planned_words()
        if local := local_spending(composed, config, config.flower.nodes):
            facts["local"] = local.words()
        alike = {f"node {number}": config.lora.r for number in range(config.flower.nodes)}
        if sums := summing(composed, config, alike, 1):
            facts["secure"] = sums.words()

    def model() -> None:
        corpus = open_stream(config.data, None, 1, config.seed, config.model.task).corpus
        facts["rows"] = f"on the nodes; {len(corpus.test) or 'none'} of the server's own to test on"
        facts.update(_model_facts(config, corpus)[0])

    for check in (lambda: load_plugins(config.plugins), strategy, model, lambda: _check_folder(config)):
        try:
            check()
        except FedLoRAError as error:
            problems.append(error)
    return facts, problems


def _stream_facts(stream: Stream, live: LiveStream | None) -> dict[str, Any]:
    if not stream.tasks:
        return {}
    if live:
        there = f"{live.come} rows of {live.origin} have come" if live.has(1) else f"{live.origin}, no round's rows yet"
        return {"stream": f"live, rounds of {live.needs(1)} rows; {there}"}
    told = []
    for task in stream.tasks:
        rows, away = sum(map(len, task.shards.values())), len(stream.corpus.shards) - len(task.shards)
        told.append(f"{task.name}: {rows} rows" + (f", none for {away} clients" if away else ""))
    return {"stream": f"{len(told)} tasks ({'; '.join(told)})"}


def _attack_facts(config: RunConfig, corpus: Any) -> dict[str, Any]:
    if config.attack is None:
        return {}
    if corpus is None:  # the data could not be read; the name and its options can be checked all the same
        build(config.attack)
        return {}
    assault = mount(config.attack, list(corpus.shards), len(corpus.labels), config.seed)
    assert assault is not None
    return {"attack": describe_attack(assault.name, assault.group)}


def _model_facts(
    config: RunConfig, corpus: Any
) -> tuple[dict[str, Any], Mapping[str, tuple[int, int]], Mapping[str, torch.Tensor]]:
    """What to say of the model, (out, in) of the adapted modules, and the tensors trained in full without numbers."""
    if corpus is None:  # the data could not be read; names and sizes can be checked all the same
        task = config.model.task if config.model.task != "auto" else "sequence-classification"
        spec = base_spec(config, task, ())
    else:
        spec = base_spec(config, task_of(config, corpus), corpus.labels)
    model = outline(spec)
    sites = find_sites(model, adapter_spec(config).target_modules)
    check_rank(sites, config.lora.r)
    merging = build_merging(config.continual.merge) if config.continual else None
    if merging:
        merging.check(sites)
    check_length(model, config.data.max_length)
    saved = find_saved(model, config.lora.modules_to_save, spec.task)
    dense = {name: p for name, p in model.named_parameters() if set(name.split(".")) & set(saved)}
    head = sum(p.numel() for p in dense.values())
    factors = sum(out + inner for out, inner in sites.values())
    told = {
        "model": f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "adapter": f"{len(sites)} layers, {factors * config.lora.r + head:,} parameters at rank {config.lora.r}",
    }
    return told, sites, dense


def _merges(config: RunConfig) -> bool:
    """Whether the base as configured takes patches into its weights."""
    precision = dtype_of(config.model.dtype, device_of(config.model.device))
    return config.model.quantization == "none" and precision == torch.float32


def _check_folder(config: RunConfig) -> None:
    folder = Path(config.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        check_folder(folder, config)
