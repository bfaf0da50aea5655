"""The application itself, a step at a time: Lightning, our callbacks, logging, evaluation and saving around the step.

It trains in a thread of its own, which waits at the end of every step until it is asked for the next.
"""

import dataclasses
import tempfile
import threading
from typing import Any

import lightning.pytorch as pl

from icl import population
from icl.build import build_model
from icl.config import RunConfig
from icl.runs import RunFolder
from icl.training.data import PromptDataModule
from icl.training.members import Member
from icl.training.module import PopulationModule
from icl.training.trainer import evaluation_sets, make_callbacks, make_trainer


class Gate(pl.Callback):
    """Lets training go on at each call until it next looks up, which is one step on a CPU and a stretch on a GPU."""

    def __init__(self) -> None:
        self.num_steps = 0
        """Of the last call."""
        self._step = 0
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self) -> None:
        """Run the next steps."""
        self._asked.release()
        self._done.acquire()

    def on_train_start(self, *_: Any) -> None:
        """Wait for the first call."""
        self._asked.acquire()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Wait for the next."""
        self.num_steps, self._step = trainer.global_step - self._step, trainer.global_step
        self._done.release()
        self._asked.acquire()


def start_application(config: RunConfig, device: str) -> Gate:
    """`icl train`, which goes on at each call; the run's folder is a temporary one."""
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, accelerator=device))
    members = [Member(config, RunFolder(tempfile.mkdtemp(prefix="icl-bench-")))]
    gate = Gate()
    trainer = make_trainer(config, members)
    callbacks = make_callbacks(members, evaluation_sets([config]))
    # The bar is left out: it would write over the table.
    trainer.callbacks += [*callbacks[:-1], gate]  # type: ignore[attr-defined]
    module = PopulationModule(members, population.stack([dict(build_model(config).named_parameters())]))
    fit = threading.Thread(target=trainer.fit, args=(module, PromptDataModule([config])), daemon=True)
    fit.start()
    return gate
