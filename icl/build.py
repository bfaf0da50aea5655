"""Build models and evaluation sets from a run's settings. Only this module makes models from settings."""

from functools import partial

import torch

from icl.config import RunConfig
from icl.evaluation.sets import REPORT, EvaluationSet, evaluation_set, set_names
from icl.model.language import LanguageModel, initialise_language
from icl.model.transformer import Transformer, initialise
from icl.runs.checkpoints import Checkpoint, CheckpointError


def build_model(config: RunConfig) -> Transformer | LanguageModel:
    """Return the run's model with its initial weights, on the CPU in float32.

    The weights depend only on `seeds.model` and the architecture. The global generator is neither read nor set.

    Examples:
        >>> from icl.presets import preset
        >>> sum(p.numel() for p in build_model(preset("L2H4")).parameters())
        51717
    """
    model, generator = build_architecture(config), torch.Generator().manual_seed(config.seeds.model)
    if isinstance(model, LanguageModel):
        initialise_language(model, generator)
    else:
        initialise(model, config.model, generator)
    return model


def build_architecture(config: RunConfig) -> Transformer | LanguageModel:
    """Return the run's model with undefined weights. Use this if weights are loaded into the model afterwards."""
    if config.model.is_language:
        text = config.language
        return LanguageModel(config.model, vocab_size=text.vocab_size, context_size=text.context_size)
    return Transformer(config.model, task_size=config.task.task_size, max_examples=config.task.max_examples)


def build_checkpoint_model(
    checkpoint: Checkpoint, *, device: torch.device | str = "cpu"
) -> Transformer | LanguageModel:
    """Return the model of a checkpoint.

    Raises:
        CheckpointError: If the names or shapes of the weights do not match the checkpoint's configuration.
    """
    model = build_architecture(checkpoint.config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in checkpoint.params.items()} != expected:
        raise CheckpointError(
            "The names or shapes of the checkpoint's weights do not match its configuration; use another checkpoint."
        )
    model.load_state_dict(checkpoint.params)
    return model.to(device)


def build_evaluation_sets(
    config: RunConfig,
    *,
    num_prompts: int,
    shifts: tuple[str, ...] = (),
    step: int = REPORT,
    model_step: int | None = None,
    with_bayes: bool = False,
    device: torch.device | str = "cpu",
) -> list[EvaluationSet]:
    """Return the run's evaluation sets: `pretrain`, `true` and `shifts`, or `test` for a language run.

    The other arguments are the same as in `evaluation_set`.
    """
    make = partial(
        evaluation_set,
        config,
        num_prompts=num_prompts,
        step=step,
        model_step=model_step,
        with_bayes=with_bayes,
        device=device,
    )
    return [make(name) for name in (*set_names(config), *shifts)]
