"""Find and read the saved steps of an older code base, and determine the settings of the run.

Settings come from the files or from the user's options, and are never guessed. If a file and an option give the same setting, their
values must agree. Some settings of training, such as the batch size, affect neither predictions nor analyses. Such a setting may remain
unknown; `config.yaml` then contains the preset's value. An unknown `trainer.max_steps` is set to the last saved step.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.config.values import read_value
from icl.files.reading import ContentError
from icl.importing.formats import FORMATS, Format
from icl.importing.pickles import OlderFileError
from icl.importing.weights import same_type
from icl.model.stacked import Params
from icl.resolve import refuse_unknown, resolve

_NEEDED = {
    "task.num_tasks": "the number M of training tasks, or inf",
    "task.noise_variance": "the noise variance sigma^2 of the targets",
    "model.num_heads": "the number of attention heads",
    "model.layer_norm": "pre, post or none",
}
"""Settings that affect predictions or results, but are missing in some files. The values are descriptions for messages."""
_EXAMPLES = {"task.num_tasks": 64, "task.noise_variance": 0.125, "model.num_heads": 4, "model.layer_norm": "pre"}
_EXAMPLES |= {"model.activation": "gelu"}
_UNKNOWN = (
    "optim.lr",
    "optim.schedule",
    "trainer.max_steps",
    "trainer.batch_size",
    "seeds.model",
    "seeds.data",
    "seeds.noise",
)
"""Settings of training that no prediction or analysis of a saved model uses. `icl import` lists which of them neither files nor options give."""


_NOT_OPTIONS = ("preset", "run_name", "population.", "checkpoints.", "task.imported_tasks")
"""Beginnings of the names of settings that the user cannot give as options, because the import itself determines them."""
_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:(?:.*[_.-])?(?:step|checkpoint|ckpt|iter|iteration)[_=.-]?)?([0-9]{1,15})")
"""Pattern of a file name that contains a step: a number alone, or a number after a word such as `step`. Other numbers may be seeds."""


class OlderStep(NamedTuple):
    """One saved step of an older code base."""

    file: Path
    step: int
    tree: Any
    """The content of the file, as `Format.read` returns it."""
    digest: str
    """SHA-256 of the file."""


class Settings(NamedTuple):
    """The settings of a run to import, and where they come from."""

    config: RunConfig
    from_files: dict[str, Any]
    from_options: dict[str, Any]
    unknown: list[str]
    """Settings whose true values are not known. For these, `config` has the values of the preset, except that `trainer.max_steps` is the
    last saved step."""


def find_files(path: Path, source: Format) -> list[Path]:
    """Return the files of saved steps at a path: the file itself, or the files in a folder.

    Raises:
        OlderFileError: If there are no such files, or a file is a broken link. If a folder below the path has such files, the message
            names this folder.
    """
    if not (path.is_file() or path.is_dir()):
        raise OlderFileError(
            f"There is nothing at {path}; give a checkpoint of {source.about}, or a folder of its checkpoints."
        )
    path = _with_folder_name(path)
    if path.is_file():
        return [path]
    files = sorted(set(_matches(path, source)))
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise OlderFileError(
            f"{lost} is not a file, or is a link to a missing file; fetch the file, or remove the link."
        )
    if not files:
        inner = next(
            (folder for folder in sorted(path.glob("**/")) if folder != path and _matches(folder, source)), None
        )
        hint = f"; some are in {inner}" if inner else ""
        if any(path.glob("**/.zarray")) or any(path.glob("**/ocdbt.process_*")):
            hint = (
                ". Orbax saved the arrays in many files, which `icl` cannot read. In the environment of the older code, restore the arrays "
                "and save them in one file with flax.serialization.to_bytes"
            )
        raise OlderFileError(
            f"{path} contains no checkpoint of {source.about}. Names of such files match {' or '.join(source.patterns)}{hint}."
        )
    return files


def number_files(files: list[Path], source: Format, step: int | None) -> list[tuple[int, Path]]:
    """Return the step and the path of each file, in order of steps. A file is read only if its name does not contain its step.

    Args:
        files: The files.
        source: The older code base that wrote the files.
        step: The step, if there is only one file and neither its name nor its content contains the step.

    Raises:
        OlderFileError: If the step of a file is not known.
        ConfigError: If `step` contradicts the file, or is given for several files.
    """
    if step is not None and len(files) > 1:
        raise ConfigError(
            f"`--step` works only for a single file, and there are {len(files):,}; put the step of each file into its name."
        )
    numbered = []
    for file in files:
        number = step_in_name(file)
        if number is None:
            number = source.step_of(_read(file, source))
        if step is not None and number is not None and number != step:
            raise ConfigError(f"`--step` is {step}, but {file} says step {number}; leave the option out.")
        number = step if number is None else number
        if number is None:
            raise OlderFileError(
                f"{file} does not say its step. Give --step N for a single file, or put the step into each file's name, as in checkpoint_step_1465.pt."
            )
        numbered.append((number, file))
    return sorted(numbered)


def read_step(number: int, file: Path, source: Format) -> OlderStep:
    """Read the file of one step.

    Raises:
        OlderFileError: If the file cannot be read, comes from another code base, or contains another step.
    """
    tree = _read(file, source)
    found = source.step_of(tree)
    if found not in (None, number):
        raise OlderFileError(f"{file} contains step {found:,}, but its name says {number:,}; correct its name.")
    return OlderStep(file, number, tree, hashlib.sha256(file.read_bytes()).hexdigest())


def settings_of(step: OlderStep, source: Format, options: Mapping[str, Any]) -> Settings:
    """Return the run's settings, from the file of its last step and the user's options.

    Raises:
        ConfigError: If a needed setting is unknown, or files and options contradict each other.
        OlderFileError: If the file contains no model of the code base `source`.
    """
    from_files = _facts(step, source)
    for key in options:
        if key.startswith(_NOT_OPTIONS):
            hint = " --out names the run." if key == "run_name" else ""
            raise ConfigError(f"`{key}` cannot be chosen for an imported run; leave out --{key}.{hint}")
    refuse_unknown(options)
    from_options = {key: read_value(key, value) for key, value in options.items()}
    for key, value in from_options.items():
        if key in from_files and read_value(key, from_files[key]) != value:
            raise ConfigError(
                f"`{key}` is {from_files[key]} according to the files of the run ({step.file}, files beside it, or the folder's name), "
                f"but {value} on the command line. Leave out --{key}."
            )
    known = {**from_files, **from_options}
    needed = _needed(known)
    missing = [key for key in needed if key not in known]
    if missing:
        words = ", ".join(f"`{key}` ({needed[key]})" for key in missing)
        example = " ".join(f"--{key} {_EXAMPLES[key]}" for key in missing)
        raise ConfigError(f"{step.file} does not contain {words}. Give the values of its run, such as {example}.")
    base = {"preset": source.preset, "checkpoints.every": None, "checkpoints.num_log": 0, "checkpoints.num_linear": 0}
    last = max(1, step.step)
    if "trainer.max_steps" not in known:
        base["trainer.max_steps"] = last
    elif read_value("trainer.max_steps", known["trainer.max_steps"]) < last:
        raise ConfigError(
            f"`trainer.max_steps` is {known['trainer.max_steps']}, but there is a file of step {last:,}; give a value of at least {last:,}."
        )
    unknown = [key for key in _UNKNOWN if key not in known]
    config = resolve(base, known, {"checkpoints.imported_from": source.name})
    return Settings(config, from_files, from_options, unknown)


def _needed(known: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the settings that must be known, each with a description. A language model needs only the activation of its MLPs, if it has any."""
    if known.get("model.family") != "language":
        return _NEEDED
    return {"model.activation": "relu, gelu or gelu_tanh"} if known["model.mlp_size"] else {}


def convert(step: OlderStep, source: Format, config: RunConfig) -> Params:
    """Return the weights of a step, keyed by their names in `icl`.

    Raises:
        OlderFileError: If the weights do not fit the run's settings, or are not finite.
    """
    try:
        params = dict(sorted(same_type(source.params(step.tree, config)).items()))
    except ContentError as error:
        raise OlderFileError(
            f"{step.file} cannot be imported: {error}. Check that it is a complete checkpoint of {source.about}."
        ) from None
    if not all(tensor.isfinite().all() for tensor in params.values()):
        raise OlderFileError(
            f"{step.file} contains weights that are not finite, because its training diverged; leave this file out."
        )
    return params


def require_one_model(step: OlderStep, first: OlderStep, source: Format) -> None:
    """Refuse a file that does not belong to the same run as the file `first`.

    Raises:
        OlderFileError: If settings differ. The message names the first difference.
    """
    facts, others = _facts(first, source), _facts(step, source)
    for key in sorted({*facts, *others} - {"optim.lr"}):
        if facts.get(key) != others.get(key):
            raise OlderFileError(
                f"{step.file} and {first.file} belong to different runs: `{key}` is {others.get(key)} in the first file and {facts.get(key)} in "
                "the second. Import each run from a separate folder."
            )


def _facts(step: OlderStep, source: Format) -> dict[str, Any]:
    """Return the settings in a file, in the name of its folder, and in other files in or above the folder."""
    try:
        found = source.facts(step.tree)
    except ContentError as error:
        raise OlderFileError(
            f"{step.file} cannot be imported: {error}. Check that it is a complete checkpoint of {source.about}."
        ) from None
    beside = source.folder_facts(step.file)
    for key, value in beside.items():
        if key in found and read_value(key, found[key]) != read_value(key, value):
            raise OlderFileError(
                f"`{key}` is {found[key]} in {step.file}, but {value} according to the files beside it or the folder's name. "
                "Put the file into the folder of its run."
            )
    try:
        return {key: read_value(key, value) for key, value in {**beside, **found}.items()}
    except ConfigError as error:
        raise OlderFileError(f"{step.file} cannot be imported: {error}") from None


def _read(file: Path, source: Format) -> Any:
    tree = source.read(file)
    if not source.is_mine(tree):
        others = (name for name, each in FORMATS.items() if each.read is source.read and each.is_mine(tree))
        hint = "".join(f"; it looks like a checkpoint for --from {name}" for name in others)
        raise OlderFileError(f"{file} is not a checkpoint of {source.about}{hint}.")
    return tree


def _matches(folder: Path, source: Format) -> list[Path]:
    groups = [[file for file in folder.glob(pattern) if not file.is_dir()] for pattern in source.patterns]
    if source.is_first_pattern:
        groups = [next((group for group in groups if group), [])]
    found = [file for group in groups for file in group]
    # Leave out macOS's hidden files, such as ._1465.pt, and Orbax's unfinished folders, such as
    # checkpoint_5.orbax-checkpoint-tmp-168.
    return [file for file in found if not file.name.startswith(".") and _UNFINISHED not in file.parent.name]


def _with_folder_name(path: Path) -> Path:
    """Return the path as an absolute path, because a folder's name can contain settings, and `.` or `1465.pt` do not show this name."""
    path = path.absolute()
    if ".." not in path.parts:
        return path
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def step_in_name(file: Path) -> int | None:
    """Return the step in a file's name, such as `1465.pt` or `checkpoint_step_1465.pt`, or None if the name contains no step."""
    for name in (
        file.stem if file.suffix in (".pt", ".pth", ".msgpack", ".safetensors") else file.name,
        file.parent.name,
    ):
        match = _STEP.fullmatch(name)
        if match:
            return int(match[1])
        if name != "checkpoint":  # only for a file named `checkpoint`, the folder's name contains the step
            return None
    return None


def describe(config: RunConfig) -> str:
    """Return one line that describes the task and the model of an imported run."""
    task, model = config.task, config.model
    if model.is_language:
        return (
            f"V = {config.language.vocab_size:,}, context {config.language.context_size:,}; {model.num_layers} layers, {model.num_heads} heads, "
            f"width {model.embed_size}, MLP {model.mlp_size or 'none'}, {model.positions} positions"
        )
    return (
        f"D = {task.task_size}, K = {task.max_examples}, M = {task.num_tasks}, noise variance {task.noise_variance:g}; "
        f"{model.num_layers} layers, {model.num_heads} heads, width {model.embed_size}, MLP {model.mlp_size}"
    )
