"""The figure of a model's predictions after different numbers of examples, compared with the predictions of ridge and dMMSE.

For one fixed prompt, the figure shows the prediction for the query x = t w / |w| against t, where w is the task.
The predictions of ridge and dMMSE are linear in t. The predictions of the transformer can have any shape.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from icl import baselines
from icl.build import build_checkpoint_model
from icl.config import RunConfig
from icl.plotting.colours import BLACK, PREDICTORS, SKY
from icl.plotting.style import new_figure
from icl.plotting.tidying import name_outside
from icl.runs.checkpoints import load_checkpoint_file
from icl.tasks.prompts import noise_law, sample_prompts, training_pool

_NUM_QUERIES = 121
_NUM_PROMPTS = 32
_MAX_QUERY = 3.0
"""Largest |t|, in standard deviations of an input."""


def plot_predictions(
    checkpoint: Path, *, num_examples: Sequence[int] = (0, 1, 2, 4, 7), index: int | None = None, title: str
) -> Figure:
    """Plot the predictions of the model, ridge and dMMSE along the task's direction, with a panel for each number of examples.

    Args:
        checkpoint: A checkpoint file.
        num_examples: Numbers of examples before the query, each below K.
        index: Index of the fixed prompt. The default is the prompt whose task has a norm nearest to sqrt(D).
        title: Title of the figure.
    """
    loaded = load_checkpoint_file(checkpoint)
    model, config = build_checkpoint_model(loaded).eval(), loaded.config
    prompts = sample_prompts(config, stream="pretrain", step=0, batch_size=_NUM_PROMPTS)
    if index is None:
        index = int((prompts.ws.norm(dim=-1) - config.task.task_size**0.5).abs().argmin())
    xs, ys, w = prompts.xs[index], prompts.ys[index], prompts.ws[index]
    direction = w / w.norm()
    t = torch.linspace(-_MAX_QUERY, _MAX_QUERY, _NUM_QUERIES)
    figure, panels = new_figure(len(num_examples), width=3.1, height=3.4, title=title)
    for axes, count in zip(panels, num_examples, strict=True):
        predictions = _predict(model, config, xs[:count], ys[:count], t[:, None] * direction)
        axes.plot(t, t * w.norm(), color=SKY, linewidth=4, alpha=0.5, label="task, w · x")
        for name, values in predictions.items():
            axes.plot(t, values, **PREDICTORS[name])
        axes.plot(xs[:count] @ direction, ys[:count], "o", color=BLACK, markersize=4, label="examples, projected on w")
        axes.set_title(f"{count} example{'s' if count != 1 else ''}", fontsize=10)
        axes.set(xlabel="query t along w", ylim=np.array([-1.25, 1.25]) * _MAX_QUERY * float(w.norm()))
    panels[0].set_ylabel("prediction for x = t w / |w|")
    name_outside(figure, panels[-1:], loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _predict(
    model: torch.nn.Module,
    config: RunConfig,
    xs: Float[Tensor, "k D"],
    ys: Float[Tensor, " k"],
    queries: Float[Tensor, "Q D"],
) -> dict[str, Float[np.ndarray, " Q"]]:
    """Return the prediction of each predictor for every query after the same examples."""
    num_queries = len(queries)
    all_xs = torch.cat([xs.expand(num_queries, *xs.shape), queries[:, None]], dim=1)  # Q k+1 D
    all_ys = torch.cat([ys.expand(num_queries, *ys.shape), torch.zeros(num_queries, 1)], dim=1)  # Q k+1
    noise_variance = config.task.noise_variance
    with torch.no_grad():
        predictions = {"model": model(all_xs, all_ys)}
    predictions["ridge"] = baselines.ridge(all_xs, all_ys, noise_variance=noise_variance)
    if not config.task.is_gaussian:
        tasks, noise = training_pool(config), noise_law(config)
        predictions["dmmse"] = baselines.dmmse(all_xs, all_ys, tasks=tasks, noise_variance=noise_variance, noise=noise)
    return {name: values[:, -1].numpy() for name, values in predictions.items()}
