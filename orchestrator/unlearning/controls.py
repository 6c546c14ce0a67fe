"""The two runs that a gate compares with: neither ever saw the target, and they differ in nothing but what is drawn.

Both have the configuration of the run without the target, and as many rounds as what they are compared with: a model
that trained longer knows more of everything, and would be taken for one that remembers.
"""

from __future__ import annotations

from pathlib import Path

from fedlora.config import RunConfig, parse_config
from fedlora.errors import ConfigError, RoundError, VerificationError
from fedlora.seeds import derive_seed
from orchestrator import launch
from orchestrator.stores.files import read_config
from orchestrator.unlearning.amend import longer
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.rollback import Rollback, build, clean_states


def train_controls(job: Job, plan: Rollback) -> tuple[Path, Path]:
    """The folders of two runs that never had the target; those that a stopped attempt left are gone on with.

    The first has the seed of the run, so it begins where the run has a checkpoint that saw nothing of the target. The
    second draws everything anew but the rows: those stay divided as they are, see ``data.seed``.

    Raises:
        VerificationError: if the run cannot be played without the target.
        FedLoRAError: what else a run may raise; the same command goes on.
    """
    config = read_config(job.folder)
    alike = longer(config, plan, read_config(job.work).rounds - config.rounds)
    first, second = job.space / "control-1", job.space / "control-2"
    build(job.folder, plan, first, alike, clean_states(job.folder, plan.start))
    build(job.folder, plan, second, drawn_anew(alike), [])
    for number, folder in enumerate((first, second), 1):
        job.listen("unlearning", {"request": job.request, "phase": f"control {number} of 2 is trained"})
        try:
            launch.resume(folder, job.listen)
        except (ConfigError, RoundError) as error:
            raise VerificationError(f"control {number} cannot be trained, so nothing can be told: {error}") from error
    return first, second


def drawn_anew(config: RunConfig) -> RunConfig:
    """The same configuration with another seed for everything but which rows there are and who has them."""
    content = config.resolved()
    if config.data.seed is None:
        content["data"]["seed"] = config.seed
    content["seed"] = derive_seed(config.seed, 0, "", "second control")
    return parse_config(content)
