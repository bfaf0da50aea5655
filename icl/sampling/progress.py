"""Progress of running chains: a bar over their moves, and a table of their draws so far."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from icl.files.writing import write_atomically
from icl.runs.checkpoints import Checkpoint
from icl.sampling import convergence
from icl.sampling.records import MAX_TRACE


class MoveBar(tqdm):
    """Progress bar over the moves of chains. A move of one chain is one unit; other work is not counted."""

    total: float

    def __init__(self, stage: str, total: int) -> None:
        super().__init__(total=total, desc=stage, unit=" moves", unit_scale=True, mininterval=0.5)

    def skip(self, num_moves: int) -> None:
        """Subtract moves that were made earlier from the total."""
        self.total = max(self.n, self.total - num_moves)
        self.refresh()

    def set_remaining(self, num_moves: int) -> None:
        """Set the number of moves that are still to be made."""
        self.total = self.n + num_moves
        self.refresh()


class RunningTrace:
    """Table of the draws so far, to read or plot while the chains run. It also shows the estimate so far on the progress bar.

    Args:
        file: File of the table. Its columns are step, chain, draw and excess in nats. It has at most `MAX_TRACE` draws of each chain.
        checkpoints: The checkpoints whose chains run.
        bar: The progress bar.
    """

    def __init__(self, file: Path, checkpoints: Sequence[Checkpoint], bar: MoveBar) -> None:
        self.file, self.steps, self.bar = file, [checkpoint.step for checkpoint in checkpoints], bar

    def __call__(self, checkpoints: Sequence[int], chains: Sequence[int], nats: Float[Tensor, "N S"]) -> None:
        """Write the draws so far."""
        stride = -(-nats.shape[1] // MAX_TRACE)
        rows = [
            {"step": self.steps[checkpoint], "chain": chain, "draw": draw * stride, "excess": value}
            for checkpoint, chain, trace in zip(checkpoints, chains, nats[:, ::stride].tolist(), strict=True)
            for draw, value in enumerate(trace)
        ]
        write_atomically(self.file, pd.DataFrame(rows).to_csv(index=False).encode(), durable=False)
        of_last = nats[[checkpoint == checkpoints[-1] for checkpoint in checkpoints]].double().numpy()
        error = convergence.standard_error(of_last)
        self.bar.set_postfix_str(f"step {self.steps[checkpoints[-1]]:,} so far: {of_last.mean():.3g} ± {error:.2g}")

    def remove(self) -> None:
        """Remove the table, once the estimate is complete."""
        self.file.unlink(missing_ok=True)
