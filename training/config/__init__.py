"""The preset, as frozen dataclasses that say what is wrong with their values. training.preset_file reads one."""

from training.config.checks import require, require_name
from training.config.data import DataConfig
from training.config.launch import LaunchConfig
from training.config.parallel import ParallelConfig
from training.config.preset import Preset
from training.config.train import EvaluateConfig, TrainConfig

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "LaunchConfig",
    "ParallelConfig",
    "Preset",
    "TrainConfig",
    "require",
    "require_name",
]
