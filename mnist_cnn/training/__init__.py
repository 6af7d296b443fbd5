"""Training: from digits and a recipe to a model, resumable at any step; see README.md.

A configuration can be made without torch; it is imported when another name is first used.
"""

from typing import TYPE_CHECKING

from mnist_cnn.device import Device
from mnist_cnn.training.recipe import PROCEDURE, RECIPES, Preset, Recipe, TrainingConfig

if TYPE_CHECKING:
    from mnist_cnn.training.checkpoint import CheckpointRefused, CheckpointStore, LocalCheckpoints
    from mnist_cnn.training.distributed import train_distributed
    from mnist_cnn.training.loop import (
        AccuracyCollapsed,
        EpochMetrics,
        Progress,
        Training,
        TrainingStopped,
        train,
    )

__all__ = [
    "PROCEDURE",
    "RECIPES",
    "AccuracyCollapsed",
    "CheckpointRefused",
    "CheckpointStore",
    "Device",
    "EpochMetrics",
    "LocalCheckpoints",
    "Preset",
    "Progress",
    "Recipe",
    "Training",
    "TrainingConfig",
    "TrainingStopped",
    "train",
    "train_distributed",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # These modules import torch, which takes seconds; the form of a flow never gets here.
    from mnist_cnn.training import checkpoint, distributed, loop

    modules = (loop, checkpoint, distributed)
    return next(vars(module)[name] for module in modules if name in vars(module))
