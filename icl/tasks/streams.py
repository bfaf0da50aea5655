"""Random streams for both families of runs: the prompts of regression runs and the rows of tokens of language runs.

Prompts and rows are pure functions of (seed, stream, step, index). Both have inputs `xs` and targets `ys`. Because training and sampling
use this module, their code need not distinguish between the families.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from icl.config import RunConfig
from icl.tasks.prompts import Prompts, PromptSource, prompt_source, sample_together
from icl.tasks.rows import RowSource, TokenRows, row_source, sample_rows_together

Source: TypeAlias = PromptSource | RowSource
"""Everything that determines one stream of a run."""


def stream_source(config: RunConfig, *, stream: str) -> Source:
    """Return the source of one stream of a run.

    Raises:
        ConfigError: If the text of a language run cannot be used, or the stream of a regression run is not a name. Also raised for
            every stream except `train` and `true`, if the pool of tasks changes during training.
    """
    return (row_source if config.model.is_language else prompt_source)(config, stream=stream)


def sample_sources(
    sources: Sequence[Source], steps: range, indices: range | Int64[Tensor, " B"], *, device: torch.device | str = "cpu"
) -> Prompts | TokenRows:
    """Sample from N sources, either all of prompts or all of rows of tokens.

    In the result, `xs` and `ys` have the leading axes N (sources), S (steps) and B (indices).
    """
    rows = [source for source in sources if isinstance(source, RowSource)]
    if rows:
        return sample_rows_together(rows, steps, indices, device=device)
    prompts = [source for source in sources if isinstance(source, PromptSource)]
    return sample_together(prompts, steps, indices, device=device)
