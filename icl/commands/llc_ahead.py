"""What `icl llc` refuses and says before it samples."""

from pathlib import Path

from icl.config import SamplerConfig
from icl.runs import run_of


def require_step(file: Path, steps: str) -> None:
    """Refuse one checkpoint's file of another step than those asked for.

    Raises:
        ConfigError: If `steps` does not name its step.
    """
    from icl.checkpoints import checkpoint_name, load_checkpoint_file
    from icl.sampling.run import chosen_files

    chosen_files([Path(checkpoint_name(load_checkpoint_file(file).step))], steps)


def require_rescalable(path: Path, factor: float) -> None:
    """Refuse now what would be refused after the whole curve without the factor.

    Raises:
        ConfigError: If the factor is not positive, or the architecture has no pair of maps that trade it.
    """
    from icl.checkpoints import checkpoint_files, load_checkpoint_file
    from icl.sampling.rescaling import rescaled

    first = load_checkpoint_file(checkpoint_files(path)[0])
    rescaled(first.config.model, first.params, factor)


def work_ahead(path: Path, sampler: SamplerConfig, *, mode: str, rescale: float = 1.0) -> str:
    """How many steps are still to be estimated, and by which chains.

    Raises:
        ConfigError: If a step is asked for that is not saved.
    """
    from icl.checkpoints import checkpoint_files, checkpoint_name
    from icl.sampling.records import VERSION, Kind
    from icl.sampling.run import chosen_files, num_moves, with_nbeta

    files = checkpoint_files(path) if path.is_file() else chosen_files(checkpoint_files(path), sampler.steps)
    kind = Kind(with_nbeta(sampler), mode, rescale)
    kept = set() if path.is_file() else kind.cache(run_of(path)).steps(kind.key, VERSION)
    left = sum(file.name not in map(checkpoint_name, kept) for file in files)
    steps = f"{len(files)} step{'s' if len(files) != 1 else ''}"
    told = f"LLC of {path}{'' if rescale == 1 else f', weights rescaled by {rescale:g}'}: "
    if not left:
        return f"{told}all is kept, {steps}."
    moves = num_moves(sampler) // sampler.num_chains - sampler.num_burnin_steps
    told += steps if left == len(files) else f"{left} of {steps} to do"
    told += f", {sampler.num_chains} chains x ({sampler.num_burnin_steps} + {moves}) moves"
    return told + ("." if path.is_file() else "; finished steps are kept.")
