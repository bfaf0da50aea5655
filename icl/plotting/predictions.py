"""The figure of a model's predictions: how they move from the prior towards the task as examples come, beside the Bayes predictors.

Of one fixed prompt, the prediction for a query x = t e along one direction e is drawn against t, after a few numbers of examples. It
is a line for ridge and nearly one for dMMSE; a transformer's is whatever it has learned.
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
from icl.checkpoints import load_checkpoint_file
from icl.config import RunConfig
from icl.plotting.style import BLACK, PREDICTORS, SKY, new_figure
from icl.plotting.tidying import name_outside
from icl.tasks.priors import task_pool
from icl.tasks.prompts import sample_prompts

_NUM_QUERIES = 121
_NUM_PROMPTS = 32
_REACH = 3.0
"""Largest |t|, in deviations of an input."""


def plot_predictions(
    checkpoint: Path, *, num_examples: Sequence[int] = (0, 1, 2, 4, 7), index: int | None = None, title: str
) -> Figure:
    """A panel for each number of examples: the model, ridge, dMMSE and the task itself along the direction of the task.

    Args:
        checkpoint: A checkpoint file.
        num_examples: Before the query; each below K.
        index: Which of the run's fixed prompts; left out, that whose task is of the most typical length, sqrt(D).
        title: Above the panels.
    """
    saved = load_checkpoint_file(checkpoint)
    model, config = build_checkpoint_model(saved).eval(), saved.config
    prompts = sample_prompts(config, stream="pretrain", step=0, batch_size=_NUM_PROMPTS)
    if index is None:
        index = int((prompts.ws.norm(dim=-1) - config.task.task_size**0.5).abs().argmin())
    xs, ys, w = prompts.xs[index], prompts.ys[index], prompts.ws[index]
    direction = w / w.norm()
    reach = torch.linspace(-_REACH, _REACH, _NUM_QUERIES)
    figure, panels = new_figure(len(num_examples), width=3.1, height=3.4)
    for axes, count in zip(panels, num_examples, strict=True):
        lines = _predict(model, config, xs[:count], ys[:count], reach[:, None] * direction)
        axes.plot(reach, reach * w.norm(), color=SKY, linewidth=4, alpha=0.5, label="w · x, the task")
        for name, values in lines.items():
            axes.plot(reach, values, **PREDICTORS[name])
        axes.plot(
            xs[:count] @ direction, ys[:count], "o", color=BLACK, markersize=4, label="examples, seen from the side"
        )
        axes.set_title(f"{count} example{'s' if count != 1 else ''}", fontsize=10)
        axes.set(xlabel="query t along w", ylim=np.array([-1.25, 1.25]) * _REACH * float(w.norm()))
    panels[0].set_ylabel("prediction for x = t w / |w|")
    name_outside(figure, panels[-1:], loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _predict(
    model: torch.nn.Module,
    config: RunConfig,
    xs: Float[Tensor, "k D"],
    ys: Float[Tensor, " k"],
    queries: Float[Tensor, "Q D"],
) -> dict[str, Float[np.ndarray, " Q"]]:
    """Each predictor's prediction for every query after the same examples."""
    size = len(queries)
    all_xs = torch.cat([xs.expand(size, *xs.shape), queries[:, None]], dim=1)  # Q k+1 D
    all_ys = torch.cat([ys.expand(size, *ys.shape), torch.zeros(size, 1)], dim=1)
    with torch.no_grad():
        found = {"model": model(all_xs, all_ys)}
    noise = config.task.noise_variance
    found["ridge"] = baselines.ridge(all_xs, all_ys, noise_variance=noise)
    if not config.task.is_gaussian:
        tasks = task_pool(int(config.task.num_tasks), config.task.task_size, config.seeds.tasks)
        found["dmmse"] = baselines.dmmse(all_xs, all_ys, tasks=tasks, noise_variance=noise)
    return {name: values[:, -1].numpy() for name, values in found.items()}
