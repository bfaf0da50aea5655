"""Tests of the code that all analyses share: each checkpoint is measured once, work resumes, and tables name their source; the command."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis import ANALYSES, analyses_of, module_name, run
from icl.analysis.run import analyse, as_table, find, named_runs, over_checkpoints
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.runs.checkpoints import CheckpointError, save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.measure import Measurement

QUICK = ["--num_prompts", "24", "--num_batches", "4", "--num_task_prompts", "8", "--num_data_prompts", "32"]
STEPS = (0, 1, 4, 20)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an analysis that is made up for these tests."""

    factor: float = 1.0


def saved_run(path: Path, steps=STEPS, config=TINY) -> RunFolder:
    """Return a run whose saved weights are those of different seeds."""
    folder = RunFolder(path)
    folder.write_config(config)
    for step in steps:
        add_step(folder, step, config)
    return folder


def add_step(folder, step, config=TINY):
    model = build_model(change(config, seeds={"model": step}))
    save_checkpoint(folder.checkpoints, step, config, model.state_dict())


class Counting:
    """A measurement of the norm of the first weights, which records the checkpoints that it gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], int]] = []

    def __call__(self, members):
        """Return one row for each member."""
        self.seen.append(([checkpoint.step for checkpoint in members.checkpoints], members.lead))
        norms = members.params["position_embedding"].flatten(1).norm(dim=1).tolist()
        rows = [[{"quantity": "norm", "value": norm}] for norm in norms]
        return [Measurement(row, {"it": torch.tensor([norm]).numpy()}) for row, norm in zip(rows, norms, strict=True)][
            members.lead :
        ]


def test_every_checkpoint_is_measured_once_and_kept(tmp_path):
    folder, measure = saved_run(tmp_path / "r"), Counting()
    parts, config = over_checkpoints("made-up", folder.path, Settings(), measure, version=1)
    assert measure.seen == [(list(STEPS), 0)]
    assert config.run_name == "tiny"
    again, _ = over_checkpoints("made-up", folder.path / "checkpoints", Settings(), measure, version=1)
    assert len(measure.seen) == 1
    assert [(p.step, p.checkpoint_hash, p.rows) for p in again] == [(p.step, p.checkpoint_hash, p.rows) for p in parts]
    assert again[2].arrays["it"] == parts[2].arrays["it"]


def test_only_what_is_new_different_or_damaged_is_done_again(tmp_path):
    folder, measure = saved_run(tmp_path / "r"), Counting()
    parts, _ = over_checkpoints("made-up", folder.path, Settings(), measure, version=1, uses_predecessor=True)
    add_step(folder, 7)
    save_checkpoint(folder.checkpoints, 0, TINY, build_model(change(TINY, seeds={"model": 9})).state_dict())
    over_checkpoints("made-up", folder.path, Settings(), measure, version=1, uses_predecessor=True)
    # 0 is different, 1 and 20 have another predecessor, 7 is new; each stretch is led by the step before it
    assert measure.seen[1:] == [([0, 1], 0), ([4, 7, 20], 1)]
    (folder.results / "made-up" / "step-000000004.json").write_bytes(b"cut short")
    over_checkpoints("made-up", folder.path, Settings(), measure, version=1, uses_predecessor=True)
    assert measure.seen[3:] == [([1, 4], 1)]
    for settings, version in ((Settings(factor=2.0), 1), (Settings(), 2)):
        measure.seen.clear()
        over_checkpoints("made-up", folder.path, settings, measure, version=version)
        assert measure.seen == [([0, 1, 4, 7, 20], 0)]
    assert len(parts) == 4


def test_a_killed_analysis_goes_on_from_the_last_population(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MEMBERS_AT_ONCE", 2)
    folder, measure = saved_run(tmp_path / "r"), Counting()

    def dies_at_the_second(members):
        if measure.seen:
            raise KeyboardInterrupt
        return measure(members)

    with pytest.raises(KeyboardInterrupt):
        over_checkpoints("made-up", folder.path, Settings(), dies_at_the_second, version=1)
    parts, _ = over_checkpoints("made-up", folder.path, Settings(), measure, version=1)
    assert measure.seen == [([0, 1], 0), ([4, 20], 0)]
    assert [part.step for part in parts] == list(STEPS)


def test_a_table_says_which_checkpoint_and_which_settings(tmp_path):
    folder = saved_run(tmp_path / "r")
    parts, _ = over_checkpoints("made-up", folder.path, Settings(factor=3.0), Counting(), version=1)
    table = as_table(parts, Settings(factor=3.0), whole_run=[{"quantity": "share", "value": 0.5}])
    assert list(table.columns) == ["step", "checkpoint_hash", "quantity", "value", "factor"]
    assert table["step"].tolist()[:4] == list(STEPS)
    assert table["step"].isna().tolist()[4]
    assert set(table["factor"]) == {3.0}


def test_checkpoints_of_two_runs_are_refused(tmp_path):
    folder = saved_run(tmp_path / "r")
    add_step(folder, 30, change(TINY, optim={"lr": 0.5}))
    with pytest.raises(CheckpointError, match=r"different runs.*optim\.lr"):
        over_checkpoints("made-up", folder.path, Settings(), Counting(), version=1)


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_settings_a_function_and_a_figure(name):
    import dataclasses
    import importlib

    module = find(name)
    assert callable(module.analyse)
    assert callable(importlib.import_module(f"icl.plotting.{module_name(name)}").plot)
    for field in dataclasses.fields(module.Settings):
        assert field.metadata["help"]
        assert field.default is not dataclasses.MISSING


def test_names_of_runs_in_a_list_may_contain_commas_or_be_a_pattern(tmp_path):
    names = ["m=4", "m=4,seed=1", "m=8,seed=1", "m=8"]
    for name in names:
        folder = RunFolder(tmp_path / name)
        folder.write_config(TINY)
        save_checkpoint(folder.checkpoints, 0, TINY, build_model(TINY).state_dict())
    first, *others = (tmp_path / name for name in names)
    assert list(named_runs(first, ",".join(map(str, others)))) == names
    assert sorted(named_runs(first, f"{tmp_path}/m=*")) == sorted(names)
    assert list(named_runs(first, f"{tmp_path}/m=8*,{tmp_path}/m=4,seed=1")) == [
        "m=4",
        "m=8",
        "m=8,seed=1",
        "m=4,seed=1",
    ]
    assert list(named_runs(first, f"{tmp_path}/m=4*")) == ["m=4", "m=4,seed=1"]
    with pytest.raises(CheckpointError, match="nowhere"):
        named_runs(first, f"{tmp_path}/m=8,nowhere")


def test_unknown_names_are_sentences():
    with pytest.raises(ConfigError, match="no analysis `gradient`; choose one of gradients"):
        analyse("gradient", "nowhere")
    with pytest.raises(ConfigError, match="no setting `size`"):
        analyse("gradients", "nowhere", size=3)


@pytest.mark.slow
def test_gradients_of_a_run_by_either_spelling(tmp_path, capsys):
    folder, out = saved_run(tmp_path / "r"), tmp_path / "gradient_results.json"
    assert main(["analyse", str(folder.path), "--what", "gradients", *QUICK]) == 0
    said = capsys.readouterr().out
    for file in (folder.results / "gradients.csv", folder.figures / "gradients.png"):
        assert str(file) in said
    assert (folder.figures / "gradients.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "gradients.csv")
    older = ["--checkpoint_dir", str(folder.path), "--output_file", str(out)]
    assert main(["analyse", "--what", "gradients", *older, *QUICK]) == 0
    assert len(json.loads(out.read_text())["rows"]) == len(table)
    quantities = table.groupby("kind")["quantity"].agg(set)
    shared = {"pc_score", "explained_share"}
    of_weights = {"norm", "squared_norm", "noise_trace", "noise_scale", "alignment_previous", "alignment_tasks"}
    assert quantities["weights"] == of_weights | shared
    assert quantities["data"] == {"gradient"} | shared
    assert set(table["num_prompts"]) == {24}
    data = table[(table["quantity"] == "gradient") & (table["estimator"] == "pathwise")]
    assert len(data) == 6 * len(STEPS)
    assert set(data["verdict"]) == {"ok"}


def test_explained_shares_of_a_line_are_one_and_zero():
    from icl.analysis.gradients import principal_components

    line = torch.arange(5.0).outer(torch.tensor([1.0, 2.0, 2.0])).numpy()
    scores, shares = principal_components(line)
    assert shares[0] == pytest.approx(1)
    assert abs(scores[:, 0]) == pytest.approx([6, 3, 0, 3, 6], abs=1e-6)
    assert principal_components(line[:1])[1].size == 0


@pytest.mark.slow
def test_all_analyses_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("icl.cli.analyse.ANALYSES", {"gradients": ANALYSES["gradients"]})
    folder = saved_run(tmp_path / "r", steps=(3,))
    assert main(["analyse", str(folder.path), "--what", "all"]) == 0
    assert (folder.results / "gradients.csv").is_file()


def test_all_goes_on_after_a_refusal_says_which_and_fails(tmp_path, monkeypatch, capsys):
    done = []

    def made_up(name, path, options):
        if name in ("hessian", "embeddings"):
            raise CheckpointError("There is no table; run `icl llc`.")
        done.append(name)

    monkeypatch.setattr("icl.cli.analyse._analyse", made_up)
    assert main(["analyse", str(tmp_path), "--what", "all"]) == 1
    every = analyses_of("regression")
    assert done == [name for name in every if name not in ("hessian", "embeddings")]
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "icl: hessian failed: There is no table; run `icl llc`.",
        f"icl: {len(done)} of {len(every)} analyses are done; failed: hessian, embeddings.",
    ]
    assert every.index("behaviour") < every.index("stages")


def test_all_analyses_of_an_empty_folder_are_one_refusal_without_headings(tmp_path, capsys):
    assert main(["analyse", str(tmp_path), "--what", "all"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count(f"There are no checkpoints at {tmp_path}") == told.err.count(" failed: There") == 1
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_noise_drowns_is_told_by_its_limit(tmp_path, capsys):
    """If |G|^2 = -3 ± 2, it is at most 4. So |G| is at most 2, and tr(Sigma) / |G|^2 is at least 40 / 4."""
    from icl.analysis.gradients import _limit

    def row(value, stderr=1.0):
        return {"value": value, "stderr": stderr, "reasons": "why"}

    last = {
        ("norm", "all", ""): row(0.0, float("inf")),
        ("squared_norm", "all", ""): row(-3.0, 2.0),
        ("noise_trace", "all", ""): row(40.0),
        ("noise_scale", "all", ""): row(float("nan")),
        ("alignment_previous", "all", ""): row(float("nan")),
        ("alignment_tasks", "all", ""): row(0.5),
    }
    told = {name: _limit(last, name) for name, _, _ in last if name not in ("squared_norm", "noise_trace")}
    assert told == {
        "norm": "at most 2 (two standard errors): noise dominates the gradient",
        "noise_scale": "at least 10 (two standard errors): noise dominates the gradient",
        "alignment_previous": "unknown: why",
        "alignment_tasks": "",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--what", "gradient"], "must be one of gradients"),
        (["RUN"], "must be one of gradients"),
        (["--what", "gradients"], "Give a run or a table to analyse"),
        (["--what", "stage"], "Did you mean `stages`?"),
        (["nowhere", "--what", "gradients"], "nothing at nowhere, nor a run"),
        (["nowhere", "--what", "stages"], "nothing at nowhere, nor a run"),
        (["nowhere", "--what", "stages", "--tolerence", "1"], "Did you mean `--tolerance`?"),
        (["nowhere", "--checkpoint_dir", "x", "--what", "gradients"], "given twice"),
        (["nowhere", "--what", "gradients", "--out", "x.txt"], ".csv or .json"),
        (["nowhere", "--what", "gradients", "--output_plot", "x.txt"], ".png, .pdf or .svg"),
        ([".", "--what", "gradients", "--num_prompts", "33"], "multiple of 32"),
        (["nowhere", "--what", "all", "--out", "x.csv"], "leave out --out"),
    ],
)
def test_a_mistake_is_one_sentence_and_fails(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the repository may contain runs, about each of which there is a sentence
    assert main(["analyse", *words]) in (1, 2)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["--what", "gradients", "--help"]])
def test_help_lists_analyses_and_their_settings(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyse", *words])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "icl analyse runs/quickstart --what gradients" in text
    assert ("--num_compared_tasks" in text) is ("gradients" in words)
    assert all(name in text for name in ANALYSES)
