"""Collect the settings of an `icl llc` command from the run, files, a sweep and the command line."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from icl.cli.outputs import require_output_table
from icl.config import RunConfig, flatten
from icl.config.validation import ConfigError, require_number
from icl.files.reading import is_beyond_floats
from icl.resolve import read_config_file, refuse_conflicts, resolve
from icl.run_names import run_name
from icl.runs.folder import local_root, require_place, run_of

if TYPE_CHECKING:
    from icl.sampling.components import Division


class Job(NamedTuple):
    """Settings of one `icl llc` command: the run, the sampler, and the file to which the rows are written."""

    path: Path
    config: RunConfig
    """Configuration of the run, in which the section `sampler` contains the settings of this command."""
    mode: str
    """Label of the rows. With --published: `published` and the settings that differ from the published ones. Otherwise: empty."""
    rescale: float | None
    """The factor of --rescale; None if the option is not given."""
    components: "Division | None"
    """The kind of components that --components chooses; None if the option is not given."""
    out: Path | None


def read_job(
    path: str | None,
    flags: frozenset[str],
    options: Mapping[str, Any],
    swept: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Job:
    """Return the settings of an `icl llc` command. They come from the run, files, the sweep and the command line."""
    from_files = [read_config_file(file) for file in options.get("config", ())]
    is_published = "published" in flags
    refuse_conflicts(swept, given)
    out = output_file(options, path, *options.get("config", ()))
    if path is None:
        family = resolve(*from_files, swept, given).model.family
        config = resolve(*from_files, _published(family) if is_published else {}, swept, given)
        folder = local_root() / run_name(config)
    else:
        for key in [key for layer in (*from_files, dict(swept), dict(given)) for key in flatten(layer)]:
            if not key.startswith("sampler."):
                raise ConfigError(
                    f"`{key}` cannot be changed, because {path} has already been trained; give only `sampler` settings."
                )
        folder = require_place(path)
        saved = saved_config(folder)
        published = _published(saved.model.family) if is_published else {}
        config = resolve(saved.to_dict(), published, *from_files, swept, given)
        if (
            folder.is_file() and "sampler.steps" in given
        ):  # for a single file, only a `sampler.steps` on the command line counts
            _require_step(folder, config.sampler.steps)
    if "stderr" in options:
        config = _until_precise(config, options["stderr"], swept, given)
    mode = _published_mode(config) if is_published else ""
    rescale = _positive_number("--rescale", options["rescale"]) if "rescale" in options else None
    return Job(folder, config, mode, rescale, options.get("components"), out)


def _until_precise(config: RunConfig, stderr: float, *layers: Mapping[str, Any]) -> RunConfig:
    """Return the settings with the value of --stderr as `target_stderr`. Allow ten times as many draws, unless the user set `num_draws`."""
    given = {key: value for layer in layers for key, value in flatten(dict(layer)).items()}
    if given.get("sampler.target_stderr") is not None and config.sampler.target_stderr != stderr:
        raise ConfigError(
            "`--stderr` and `--sampler.target_stderr` are the same setting but have different values; give only one of them."
        )
    draws = config.sampler.num_draws * (1 if "sampler.num_draws" in given else 10)
    return dataclasses.replace(
        config, sampler=dataclasses.replace(config.sampler, target_stderr=stderr, num_draws=draws)
    )


def output_file(options: Mapping[str, Any], *inputs: str | None) -> Path | None:
    """Return the file that `--out` names, or None if the option is not given. Refuse a file that cannot be written, or that the command reads."""
    if "out" not in options:
        return None
    if not options["out"].strip():
        raise ConfigError("`--out` must name a file, got nothing.")
    out = Path(options["out"])
    require_output_table(out, *inputs)
    return out


def saved_config(path: Path) -> RunConfig:
    """Return the configuration in the run's folder, or the configuration in the first checkpoint if the folder has no config.yaml."""
    from icl.sampling.run import run_files

    run = run_of(path)
    return run.read_config() if run.config_file.is_file() else run_files(path)[1]


def _require_step(file: Path, steps: str) -> None:
    """Refuse a single checkpoint file if `steps` does not select its step."""
    from icl.runs.checkpoints import checkpoint_name, load_checkpoint_file
    from icl.sampling.run import chosen_files

    chosen_files([Path(checkpoint_name(load_checkpoint_file(file).step))], steps)


def require_rescalable(path: Path, factor: float) -> None:
    """Refuse a factor, or an architecture, for which weights cannot be rescaled.

    The check comes before any estimate, because estimating the LLCs of the original weights takes long.
    """
    from icl.runs.checkpoints import checkpoint_files, load_checkpoint_file
    from icl.sampling.rescaling import rescaled

    first = load_checkpoint_file(checkpoint_files(path)[0])
    rescaled(first.config.model, first.params, factor)


def _published(family: str) -> dict[str, Any]:
    from icl.sampling.published import published

    values = dataclasses.asdict(published(family))
    return {f"sampler.{name}": values[name] for name in values if name not in ("steps", "memory", "num_init_batches")}


def _published_mode(config: RunConfig) -> str:
    """Return the label of the rows: `published`, and the settings that differ from the published ones."""
    values = flatten({"sampler": dataclasses.asdict(config.sampler)})
    published = _published(config.model.family)
    changes = [f"{key.partition('.')[2]}={values[key]}" for key, value in published.items() if values[key] != value]
    return ", ".join(["published", *changes])


def _positive_number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"`{option}` must be a number, got {text!r}.") from None
    if is_beyond_floats(text, number):
        raise ConfigError(f"`{option}` is too large or too small for a floating-point number, got {text}.")
    require_number(option, number, "positive")
    return number
