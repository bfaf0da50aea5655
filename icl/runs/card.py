"""The model card of a repository on the Hugging Face Hub: `README.md`, with a section for each run.

A section shows the run's settings, its checkpoints, a table of losses, and one figure. The figure is `figures/training.png` or, if the run
has no such figure, `figures/evaluation.png`. Each section begins and ends with an HTML comment. Text outside the sections belongs to the
user and is not changed.
"""

import csv
import io
import re

from icl.config import RunConfig
from icl.config.validation import UserError
from icl.files.reading import ContentError, read_bytes
from icl.runs.checkpoints import list_steps
from icl.runs.folder import RunFolder

CARD = "README.md"
_HEAD = """---
library_name: icl
tags:
- in-context-learning
---

# Transformers that learn in context

Made with `icl`. Each run has a folder with its checkpoints, as `icl` saves them. The weights are safetensors files.
"""
_MAX_ROWS = 40
_FIGURES = ("figures/training.png", "figures/evaluation.png")


def card_text(old: str, run: RunFolder, name: str, store: str) -> str:
    """Return the card with a new section for a run.

    The new section replaces the run's old section. If there is no old section, the new section is added at the end.

    Args:
        old: The present card; empty if there is no card yet.
        run: The run's folder.
        name: Path of the run's folder in the store.
        store: The store's address.

    Raises:
        ConfigError: If the run's settings cannot be read.
    """
    begin, end = f"<!-- icl run {name} -->", f"<!-- end of icl run {name} -->"
    section = f"{begin}\n{_section(run, name, store)}\n{end}"
    card = old if old.strip() else _HEAD
    # A section without its closing comment is not replaced, because the text after the opening comment may be the user's.
    pattern = re.compile(f"{re.escape(begin)}(?:(?!{re.escape(begin)}).)*?{re.escape(end)}", re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda match: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n"


def _section(run: RunFolder, name: str, store: str) -> str:
    config, steps = run.read_config(), list_steps(run.checkpoints)
    parts = [f"## {name}", _settings(config)]
    if steps:
        parts.append(f"{len(steps):,} checkpoints, from step {steps[0]:,} to step {steps[-1]:,}.")
        parts.append(
            f'```python\nfrom icl import load_model\n\nmodel = load_model("{store}/{name}")  # the last checkpoint\n'
            f'first = load_model("{store}/{name}", step={steps[0]})\n```'
        )
    figure = next((file for file in _FIGURES if (run.path / file).is_file()), None)
    if figure is not None:
        parts.append(f"![Training of {name}]({name}/{figure})")
    table = _losses(run)
    if table:
        what = "Loss in nats per token" if run.read_config().model.is_language else "Mean squared error per target"
        parts += [f"{what} of the model and of the baselines:", table]
    return "\n\n".join(parts)


def _settings(config: RunConfig) -> str:
    task, model, optim, text = config.task, config.model, config.optim, config.language
    source = config.checkpoints.imported_from
    is_language = model.is_language
    world = f", {task.world}" if task.world else ""
    if is_language:
        unit = "rows"
        rows = {
            "Text": f"{text.source}, in rows of {text.context_size:,} tokens, vocabulary of {text.vocab_size:,} tokens"
        }
    else:
        unit = "prompts"
        data = f"D = {task.task_size}, K = {task.max_examples}, M = {task.num_tasks}, noise variance {task.noise_variance:g}"
        rows = {"Task": data + world}
    rows |= {
        "Model": f"{model.num_layers} layers, {model.num_heads} heads, width {model.embed_size}, MLP {model.mlp_size}, "
        f"layer norm {model.layer_norm}",
        "Training": f"imported from {source}"
        if source
        else f"{config.trainer.max_steps:,} steps of {config.trainer.batch_size:,} {unit}, {optim.schedule} learning rate {optim.lr:g}",
        "Preset": config.preset,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _losses(run: RunFolder) -> str:
    """Return `results/losses.csv` as a Markdown table.

    Return an empty string if the file cannot be read, if it has no rows or more than `_MAX_ROWS` lines, or if its rows differ in length.
    """
    try:
        text = read_bytes(run.results / "losses.csv").decode("utf-8")
        rows = list(csv.reader(io.StringIO(text)))
    except (OSError, ContentError, UserError, ValueError, csv.Error):
        return ""
    if not 1 < len(rows) <= _MAX_ROWS or len({len(row) for row in rows}) != 1:
        return ""
    cells = [[_cell(value) for value in row] for row in rows]
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return the content of a cell: a number with four significant digits, or text without special characters such as `|` and `*`."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return re.sub(r"[^\w .:+-]", "", text)
