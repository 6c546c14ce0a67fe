"""Strategies that do not fit the rest of a configuration, refused before anything runs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from clients.attacks import build
from fedlora.aggregation import Strategy, compose
from fedlora.aggregation.prototypes import Prototypes
from fedlora.aggregation.wrapper import described
from fedlora.config import ContinualConfig, RunConfig
from fedlora.continual.merging import build_merging
from fedlora.continual.plateau import Never, build_policy
from fedlora.errors import ConfigError, nearest
from fedlora.plugins import load_plugins
from fedlora.protocol import ClientInfo
from fedlora.unlearning.recipe import recipe_of
from orchestrator.selection import build_selector, how_many
from orchestrator.stores.remote import is_url


def check_names(config: RunConfig) -> None:
    """Raise ``ConfigError`` for whatever a configuration names and nobody knows: quick, and nothing is touched."""
    load_plugins(config.plugins)
    check_shards(compose(config.strategy), config)
    build_selector(config.clients.selection)
    if config.continual:
        build_policy(config.continual.freeze)
        build_merging(config.continual.merge)
    if config.attack:
        build(config.attack)
    for asked in config.forgetting:
        recipe_of(asked)


def check_strategy(strategy: Strategy, config: RunConfig, clients: Sequence[str], merges: bool) -> None:
    """Raise ``ConfigError`` where a strategy and a configuration cannot work together.

    Args:
        clients: ids of everyone registered.
        merges: whether the base takes patches into its weights; one that is quantised or in half precision
            carries them beside.
    """
    name, traits = described(strategy), strategy.traits
    if traits.personal and config.data.client_holdout == 0:
        raise ConfigError(
            f"strategy: {name} keeps parts on the clients, so only they can score their models;"
            " set data.client_holdout above 0"
        )
    freezes = _check_continual(strategy, config.continual, config.lora.use_dora) if config.continual else False
    if traits.protects and not freezes:
        raise ConfigError(
            f"strategy: {name} protects what a stream has frozen, and nothing is frozen here; give the run a continual:"
            " section with continual.freeze, or leave the wrapper out"
        )
    if traits.head_only and config.lora.use_dora:
        raise ConfigError(
            f"strategy: {name} trains what is trained in full, which DoRA's magnitudes would be too; set lora.use_dora:"
            " false"
        )
    if (traits.patches_base or freezes) and config.lora.use_dora and not merges:
        what = name if traits.patches_base else "continual.freeze"
        raise ConfigError(
            f"strategy: {what} patches the base, which DoRA normalises, and this base carries patches beside its"
            " weights; use model.dtype: float32 without quantization, or lora.use_dora: false"
        )
    if traits.freezes and config.lora.use_dora:
        raise ConfigError(
            f"strategy: {name} gives clients components beside the layer, which DoRA would not normalise; use flora or"
            " fedex, or lora.use_dora: false"
        )
    if traits.core and config.lora.use_dora:
        raise ConfigError(f"strategy: {name} trains a core that DoRA does not know of; set lora.use_dora: false")
    for client in strategy.required:
        if client not in clients:
            raise ConfigError(
                f"strategy: {name} needs the client {client}, which is not registered{nearest(client, clients)}"
            )
    if config.evaluation.probe and traits.personal:
        raise ConfigError(
            f"evaluation.probe scores one global model, and {name} keeps parts on the clients; leave the probe out"
        )
    if config.wire.error_feedback and not traits.fixed_gauge:
        raise ConfigError(
            f"wire.error_feedback: what an update left unsent is kept in factor coordinates, and {name} changes their"
            " basis every round; use ffa, rolora, zero_pad or rbla, or leave it out: int8 loses little without it"
        )
    _check_schedule(name, strategy, config, clients)
    if config.ledger.max_rank is not None and not (traits.patches_base or freezes):
        raise ConfigError(
            f"ledger.max_rank has no effect: {name} does not patch the base, and no task is frozen into it; use flora,"
            " fedex or fedex_het"
        )


def check_shards(strategy: Strategy, config: RunConfig) -> None:
    """Raise ``ConfigError`` where the clients of a run cannot be dealt into shards."""
    if config.federation.shards == 1:
        return
    name = described(strategy)
    if strategy.traits.personal:
        raise ConfigError(
            f"federation.shards: {name} keeps parts on the clients, so that shards have no whole models to combine; use"
            " a strategy without personal parts"
        )
    if strategy.traits.private:
        raise ConfigError(
            f"federation.shards: what {name} spends is counted for one run of everybody, and every shard is one of"
            " its own; set shards to 1"
        )
    if strategy.required:
        raise ConfigError(
            f"federation.shards: {name} needs {', '.join(strategy.required)} in every round, and a client is in one"
            " shard only; use a rule without a root"
        )
    if is_url(config.output_dir):
        raise ConfigError(
            f"federation.shards: a run of shards is played on this machine's disk, and output_dir is"
            f" {config.output_dir}; choose a folder"
        )


def check_head(strategy: Strategy, dense: Mapping[str, Tensor]) -> None:
    """Raise ``ConfigError`` where a strategy is about a head that the model does not have.

    Args:
        dense: the tensors trained in full, by name.
    """
    if strategy.traits.head_only and not dense:
        raise ConfigError(
            f"strategy: {described(strategy)} trains what is trained in full alone, and nothing of this model is: a"
            " language model has no new head; give rows of text and label, name lora.modules_to_save, or use flexlora"
        )
    for layer in strategy.layers():
        if isinstance(layer, Prototypes):
            layer.place(dense)


def _check_continual(strategy: Strategy, settings: ContinualConfig, use_dora: bool) -> bool:
    """Whether a stream's tasks go into the base; raises where it cannot be played like this."""
    name, traits = described(strategy), strategy.traits
    if traits.personal:
        raise ConfigError(
            f"strategy: {name} keeps parts on the clients, and the tasks of a stream are scored for one global model;"
            " use a strategy without personal parts"
        )
    never = isinstance(build_policy(settings.freeze), Never)
    if build_merging(settings.merge):
        if never:
            raise ConfigError("continual.merge combines what is frozen, and continual.freeze is never; use boundaries")
        if traits.patches_base:
            raise ConfigError(
                f"continual.merge combines whole tasks, and {name} patches the base in every round; use flexlora,"
                " zero_pad or fedit, or merge: sum"
            )
        if use_dora:
            raise ConfigError(
                "continual.merge changes the updates of the tasks, and the magnitudes of DoRA were trained for those as"
                " they were; set lora.use_dora: false, or merge: sum"
            )
    if settings.isolated:
        if traits.patches_base:
            raise ConfigError(
                f"continual.isolated starts every task from the bare base, and {name} patches it in every round; use"
                " flexlora, zero_pad or fedit"
            )
        if traits.writes_head:
            raise ConfigError(
                f"strategy: {name} remembers class means from task to task, and with continual.isolated every task has"
                " features of its own; leave prototypes out"
            )
        if traits.protects or traits.outermost:
            raise ConfigError(
                f"strategy: {name} protects earlier tasks, and with continual.isolated no later one touches them; leave"
                " that wrapper out"
            )
    return not never and not settings.isolated


def check_stream(strategy: Strategy, members: Sequence[ClientInfo]) -> None:
    """Raise ``ConfigError`` where a strategy needs a client in every round that has no rows in some."""
    for member in members:
        if member.id in strategy.required and any(not rows for rows, _ in member.stages):
            raise ConfigError(
                f"strategy: {described(strategy)} needs {member.id} in every round, and it has no rows of some task of"
                " the stream; name another client, or use a rule without a root"
            )


def _check_schedule(name: str, strategy: Strategy, config: RunConfig, clients: Sequence[str]) -> None:
    schedule, traits = config.schedule, strategy.traits
    later = schedule.mode == "async" or schedule.late == "keep"
    asked = "schedule.mode: async" if schedule.mode == "async" else "schedule.late: keep"
    if later and "staleness" not in name:
        raise ConfigError(
            f"strategy: {asked} brings updates of older models, which {name} would take for new ones; put staleness"
            " over the rule: strategy: [staleness, flexlora]"
        )
    if later and (traits.patches_base or traits.personal or traits.whole_cohort or traits.core):
        raise ConfigError(
            f"strategy: {asked} brings updates of older models, and {name} needs everyone at the same one; use"
            " flexlora, zero_pad or fedit under staleness"
        )
    if strategy.required and (schedule.mode == "async" or schedule.over_selection > 1):
        reason = "schedule.mode: async" if schedule.mode == "async" else "schedule.over_selection"
        raise ConfigError(
            f"strategy: {name} needs {', '.join(strategy.required)} in every round, and {reason} may close one without;"
            " use synchronous rounds without over-selection"
        )
    if schedule.mode == "async":
        if schedule.over_selection > 1 or schedule.late == "keep":
            key = "late" if schedule.late == "keep" else "over_selection"
            raise ConfigError(f"schedule.{key} is for synchronous rounds; schedule.mode is async, where nobody is late")
        busy = how_many(config.clients.per_round, len(clients))
        if schedule.buffer > busy:
            raise ConfigError(
                f"schedule.buffer is {schedule.buffer}, but clients.per_round keeps {busy} clients busy; lower it"
            )
        if config.clients.selection == "poisson":
            raise ConfigError("clients.selection: poisson draws whole rounds; use uniform with schedule.mode: async")
    elif schedule.late == "keep" and schedule.deadline_s is None and schedule.over_selection == 1:
        raise ConfigError("schedule.late: keep has no effect without deadline_s or over_selection: nobody is late")
