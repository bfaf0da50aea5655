"""Count the modules of `icl` that run in two typical computations, called walks.

- `llc`: from a saved checkpoint to the row of its LLC (`icl.sampling.run.estimate_run` on one checkpoint file).
- `loss`: from a random stream to the loss of a model on a batch of prompts (`sample_prompts` and `apply`).

Code that runs through many modules is hard to follow. `python -m tools.count_modules` prints the modules of each walk, in
the order in which their functions are first called.
"""

import importlib
import pkgutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import icl
from icl.build import build_model
from icl.config import RunConfig, SamplerConfig
from icl.model.stacked import Params, apply, stack
from icl.presets import preset
from icl.runs.checkpoints import checkpoint_name, save_checkpoint
from icl.sampling.run import estimate_run
from icl.store.base import LocalStore
from icl.tasks.prompts import sample_prompts

_SAMPLER = SamplerConfig(
    num_chains=2, num_draws=4, num_burnin_steps=2, num_samples=64, batch_size=16, nbeta=5.0, num_init_batches=2
)


def modules_of(walk: Callable[[], object]) -> list[str]:
    """Return the modules of `icl` whose functions run during the call `walk()`, in the order of their first calls."""
    names: dict[str, None] = {}

    def note(frame: types.FrameType, event: str, arg: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("icl."):
            names.setdefault(name)

    # Import everything first: importing a module runs its class bodies and decorators, which are not part of a walk.
    for module in pkgutil.walk_packages(icl.__path__, "icl."):
        if not module.name.rpartition(".")[2].startswith("_"):  # not `__main__`, and not the compiled kernel
            importlib.import_module(module.name)
    sys.setprofile(note)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return list(names)


def walks() -> dict[str, list[str]]:
    """Return the modules of each walk."""
    config = preset("quickstart")
    params = {name: tensor.detach() for name, tensor in build_model(config).named_parameters()}
    with TemporaryDirectory() as folder:
        save_checkpoint(LocalStore(folder), 0, config, params)
        file = Path(folder) / checkpoint_name(0)
        llc = modules_of(lambda: estimate_run(file, _SAMPLER).table.to_csv(index=False))
    return {"llc": llc, "loss": modules_of(lambda: _loss(config, stack([params])))}


def _loss(config: RunConfig, params: Params) -> float:
    xs, ys, _ = sample_prompts(config, stream="true", step=0, batch_size=8)
    return float((apply(config.model, params, xs, ys) - ys).square().mean())


def main() -> None:
    """Print every walk."""
    for name, modules in walks().items():
        print(f"{name}: {len(modules)} modules\n  " + "\n  ".join(modules))


if __name__ == "__main__":
    main()
