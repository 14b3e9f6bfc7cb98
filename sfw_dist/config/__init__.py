"""A run's configuration: typed dataclasses, YAML files that inherit, dotted overrides on the command line.

The dataclasses hold the only defaults. A YAML file overrides them, may start from another file (``base: other.yaml``,
relative to itself), and the command line overrides the file::

    python -m sfw_dist.train --config configs/digits/sfw.yaml --optimizer.lr 0.5

Unknown keys and values outside a field's domain raise :class:`~sfw_dist.errors.UserError` with the key, the value and
the remedy.
"""

from sfw_dist.config.constraint import ConstraintConfig
from sfw_dist.config.parse import add_resume_option, check_keys, load_config, parse_run, read_yaml, save_config
from sfw_dist.config.schema import (
    Config,
    DataConfig,
    DeepSpeedConfig,
    FSDPConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    ScheduleConfig,
    TrainConfig,
    first_difference,
)
from sfw_dist.config.training_methods import CramConfig, GMPConfig, InitConfig, KScheduleConfig, SampledConfig

__all__ = [
    "Config",
    "ConstraintConfig",
    "CramConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "FSDPConfig",
    "GMPConfig",
    "InitConfig",
    "KScheduleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruneConfig",
    "SampledConfig",
    "ScheduleConfig",
    "TrainConfig",
    "add_resume_option",
    "check_keys",
    "first_difference",
    "load_config",
    "parse_run",
    "read_yaml",
    "save_config",
]
