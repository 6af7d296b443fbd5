"""Evaluation: from a model and test digits to figures, each with its interval or its gap.

The figures can be read without torch; it is imported when a model is measured.
"""

from typing import TYPE_CHECKING

from mnist_cnn.evaluation.figures import Evaluation

if TYPE_CHECKING:
    from mnist_cnn.evaluation.outcomes import Outcomes, measure, measure_all, predict
    from mnist_cnn.evaluation.summary import evaluate

__all__ = ["Evaluation", "Outcomes", "evaluate", "measure", "measure_all", "predict"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # These modules import torch, which takes seconds; a reader of figures never gets here.
    from mnist_cnn.evaluation import outcomes, summary

    return next(vars(module)[name] for module in (outcomes, summary) if name in vars(module))
