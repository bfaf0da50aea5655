"""In-context linear regression: train small transformers, compare them with Bayes predictors, and study their development.

The functions below are loaded on first use, so importing `icl` takes almost no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icl.api import (
        ICRegConfig,
        evaluate_ood_score,
        load_checkpoint,
        load_model,
        predict_from_prompt,
        train_ic_regression,
    )

__version__ = "0.1.0"

__all__ = [
    "ICRegConfig",
    "evaluate_ood_score",
    "load_checkpoint",
    "load_model",
    "predict_from_prompt",
    "train_ic_regression",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from icl import api

        return getattr(api, name)
    raise AttributeError(f"module 'icl' has no attribute '{name}'")
