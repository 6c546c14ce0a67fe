"""The run's configuration: the only reader of YAML.

Unknown keys are errors that name the nearest known key. Algorithms never see these objects; factories take plain
arguments.
"""

from fedlora.config.federation import FlowerConfig
from fedlora.config.forgetting import ForgettingConfig
from fedlora.config.privacy import LocalPrivacyConfig, PrivacyConfig, SecureSumConfig
from fedlora.config.reading import differences, known_keys, load_config, parse_config
from fedlora.config.run import RunConfig
from fedlora.config.sections import (
    AttackConfig,
    ClientsConfig,
    ContributionsConfig,
    DataConfig,
    Distribution,
    FleetConfig,
    PartitionConfig,
    ScheduleConfig,
    TrainingConfig,
)
from fedlora.config.stream import ContinualConfig, StreamTaskConfig

__all__ = [
    "AttackConfig",
    "ClientsConfig",
    "ContinualConfig",
    "ContributionsConfig",
    "DataConfig",
    "Distribution",
    "FleetConfig",
    "FlowerConfig",
    "ForgettingConfig",
    "LocalPrivacyConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "ScheduleConfig",
    "SecureSumConfig",
    "StreamTaskConfig",
    "TrainingConfig",
    "differences",
    "known_keys",
    "load_config",
    "parse_config",
]
