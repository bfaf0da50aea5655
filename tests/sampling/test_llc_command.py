"""The command `icl llc`: settings from run, file, sweep point and command line; exit status; printed lines and written files."""

import dataclasses
import json

import pandas as pd
import pytest
import yaml
from llc_runs import CONFIG, QUICK, make_run

from icl.cli import llc, main
from icl.cli.llc_output import describe_work
from icl.command_line import llc_parser
from icl.config import RunConfig
from icl.plotting.llc import plot_llc, read_stages
from icl.presets import preset
from icl.run_names import run_name, sampler_name
from icl.runs.checkpoints import checkpoint_files
from icl.sampling import run as runs
from icl.sampling.published import PUBLISHED

SIZES = {"num_chains": 2, "num_burnin_steps": 1, "num_draws": 2, "batch_size": 1, "num_samples": 2}
TOLD = {"nbeta": 1.0, "localization": 1.0, "lr": 1.0, **SIZES}
"""What a table says of its chains."""


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "tiny", steps=(0, 30))


@pytest.fixture
def sampler_of(monkeypatch):
    """Return the settings to which the command resolves, without sampling."""
    seen = {}

    def estimate(job, wandb_run):
        seen["job"] = job
        return 0

    monkeypatch.setattr(llc, "_estimate", estimate)

    def read(*words):
        seen.clear()
        status = main(["llc", *map(str, words)])
        return seen["job"] if seen else status

    return read


def said(capsys, *words):
    assert main(["llc", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_run_is_estimated_told_and_drawn(folder, capsys):
    assert main(["llc", str(folder.path), "--steps", "last"]) in (0, 1)
    told = capsys.readouterr().out
    row = pd.read_csv(folder.results / "llc.csv").iloc[0]
    assert f"Verdicts: 1 {row['verdict']}" in told
    assert str(folder.results / "llc.csv") in told
    assert "the loss of predicting zero is" in told
    for name in ("llc.png", "llc-traces.png"):
        assert (folder.figures / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        pytest.param(("invalid", "suspect"), 0, marks=pytest.mark.slow),
        (("invalid", "invalid"), 1),
        pytest.param(("ok", "ok"), 0, marks=pytest.mark.slow),
    ],
)
def test_the_exit_status_says_whether_anything_can_be_used(folder, monkeypatch, capsys, verdicts, status):
    true = runs.make_record
    left = list(verdicts)

    def judged(result, kind):
        record = true(result, kind)
        return record._replace(row=record.row | {"verdict": left.pop(0)})

    monkeypatch.setattr(runs, "make_record", judged)
    assert main(["llc", str(folder.path)]) == status
    assert ("every estimate is invalid" in capsys.readouterr().err) == (status == 1)


def test_a_step_size_far_too_large_exits_with_1_outside_a_sweep_and_is_a_result_in_one(
    folder, monkeypatch, tmp_path, capsys
):
    words = ["llc", str(folder.path), "--steps", "last", "--sampler.lr", "10"]
    assert main(words) == 1
    point = tmp_path / "point.json"
    point.write_text(json.dumps({"sampler.lr": 10}))
    monkeypatch.setenv("ICL_SWEEP_POINT", str(point))
    assert main([*words[:-2]]) == 0
    assert "every estimate is invalid" in capsys.readouterr().err


def test_the_runs_own_settings_count_then_the_file_then_the_command_line(folder, sampler_of, tmp_path):
    assert sampler_of(folder.path).config.sampler == QUICK
    file = tmp_path / "sampler.yaml"
    file.write_text(yaml.safe_dump({"sampler": {"lr": 1e-3, "num_chains": 5}}))
    job = sampler_of(folder.path, "--config", file, "--sampler.num_chains", 7, "--steps", 0, 30)
    assert job.config.sampler == dataclasses.replace(QUICK, lr=1e-3, num_chains=7, steps="0,30")


def test_without_a_run_it_is_the_one_that_training_makes_of_the_settings(sampler_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    assert "train it with `icl train`" in said(capsys, "--task.num_tasks", 8)
    make_run(tmp_path / "quickstart,num_tasks=8", steps=(0,))
    job = sampler_of("--task.num_tasks", 8, "--sampler.lr", 1e-6)
    assert job.path == tmp_path / "quickstart,num_tasks=8"
    assert job.config.sampler == dataclasses.replace(preset("quickstart").sampler, lr=1e-6)


def test_a_point_of_a_sweep_gives_its_settings(sampler_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_ROOT", str(tmp_path))
    make_run(tmp_path / "quickstart,num_tasks=8", steps=(0,))
    point = tmp_path / "point.json"
    point.write_text(json.dumps({"task.num_tasks": 8, "sampler": {"nbeta": 7.0}}))
    monkeypatch.setenv("ICL_SWEEP_POINT", str(point))
    assert sampler_of().config.sampler.nbeta == 7.0
    assert "is swept" in said(capsys, "--sampler.nbeta", 8)


def test_the_published_mode_has_the_published_settings_and_says_what_was_changed(folder, sampler_of):
    job = sampler_of(folder.path, "--published")
    assert job.mode == "published"
    names = ("lr", "nbeta", "localization", "num_chains", "num_draws", "num_burnin_steps", "batch_size", "num_samples")
    assert all(getattr(job.config.sampler, name) == getattr(PUBLISHED, name) for name in names)
    job = sampler_of(folder.path, "--published", "--sampler.num_draws", 10, "--steps", "last")
    assert job.mode == "published, num_draws=10"
    assert job.config.sampler.num_draws == 10


def test_the_published_mode_says_what_it_measures(folder, capsys):
    small = [
        "--sampler.num_draws",
        "4",
        "--sampler.batch_size",
        "16",
        "--sampler.num_samples",
        "64",
        "--sampler.num_chains",
        "2",
    ]
    main(["llc", str(folder.path), "--published", "--steps", "last", *small])
    told = capsys.readouterr().out
    assert "Published settings. E[L] is" in told
    assert "E[L]" in told.splitlines()[0]
    row = pd.read_csv(folder.results / "llc.csv").iloc[0]
    assert row["mode"] == "published, num_samples=64, batch_size=16, num_chains=2, num_draws=4"
    assert row["nbeta"] == pytest.approx(66.667, rel=1e-4)


def test_the_curve_shows_stages_and_marks_verdicts(tmp_path):
    table = pd.DataFrame(
        {
            "step": [0, 10, 100],
            "llc": [-5.0, 20.0, float("nan")],
            "stderr": [1.0, 2.0, float("nan")],
            "verdict": ["suspect", "ok", "invalid"],
            "init_loss": [2.0, 1.0, 1.0],
            "mean_loss": [1.9, 1.1, float("nan")],
        }
    ).assign(**TOLD)
    folder = make_run(tmp_path / "staged", steps=())
    assert read_stages(folder) == []
    folder.write_result("stages.csv", "stage,start,end\nLR1,0,10\nLR2,10,60\nLR3,60,100\n,,\n")
    assert read_stages(folder) == [10.0, 60.0]  # the last stage's end is the run's
    figure = plot_llc(table, 2.25, title="x", stages=[10.0, 60.0])
    estimates = figure.axes[3]
    labels = {text.get_text() for text in estimates.get_legend().get_texts()}
    assert labels == {"ok", "suspect", "invalid (at the edge: no estimate)"}
    vertical = [line for line in estimates.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    assert {float(line.get_xdata()[0]) for line in vertical} >= {10.0, 60.0}


def test_the_figure_adds_what_the_chains_settle_by_unless_they_escaped():
    table = pd.DataFrame(
        [
            {"step": 10, "llc": 20.0, "drop_at_mean": 30.0, "verdict": "suspect", "mean_loss": 1.1},
            {"step": 20, "llc": 40.0, "drop_at_mean": 2.0, "verdict": "ok", "mean_loss": 1.1},
            {"step": 30, "llc": 90.0, "drop_at_mean": 9.0, "verdict": "invalid", "mean_loss": 2.0},
        ]
    ).assign(stderr=1.0, drop_at_mean_stderr=1.0, init_loss=1.0, trivial_loss=2.25, **TOLD)
    estimates = plot_llc(table, 2.25, title="x").axes[3]
    (bars,) = [bars for bars in estimates.containers if bars.get_label() == "LLC + drop at the mean of the draws"]
    assert bars.lines[0].get_xydata().tolist() == [[10.0, 50.0]]
    assert estimates.get_ylim()[1] > 50


@pytest.mark.slow
def test_the_rows_go_to_a_file_of_ones_own(folder, tmp_path, capsys):
    main(["llc", str(folder.path), "--steps", "last", "--out", str(tmp_path / "rows.json")])
    main(["llc", str(folder.path), "--steps", "last", "--out", str(tmp_path / "rows.csv")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["step"] == 30
    assert pd.read_csv(tmp_path / "rows.csv")["llc"].item() == pytest.approx(row["llc"])


@pytest.mark.slow
def test_the_control_adds_rows_of_rescaled_weights(folder, tmp_path, capsys):
    main(["llc", str(folder.path), "--steps", "last", "--rescale", "2", "--out", str(tmp_path / "rows.csv")])
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert rows["rescale"].tolist() == [1.0, 2.0]
    assert rows["init_loss"].iloc[0] == pytest.approx(rows["init_loss"].iloc[1], rel=1e-5)
    assert "the model's function unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sampler.nbta", "3"], "Did you mean `sampler.nbeta`?"),
        (["--task.num_tasks", "3"], "has already been trained"),
        (["--sampler.lr", "-1"], "`sampler.lr` must be positive"),
        (["--sampler.batch_size", "300"], "multiple of `sampler.batch_size`"),
        (["--sampler.kernel", "mala"], "sgld"),
        (["--steps", "31"], "nearest is 30"),
        (["--published", "--calibrate"], "at a time"),
        (["--out", "rows.txt"], ".csv"),
        (["--rescale", "x"], "must be a number"),
        (["--rescale", "0"], "must be positive"),
        (["--calibrat"], "Did you mean `--calibrate`?"),
        (["--setps", "1"], "Did you mean `--steps`?"),
    ],
)
def test_mistakes_are_sentences_before_any_work(folder, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(runs, "estimate_grid", None)
    assert main(["llc", str(folder.path), *words]) != 0
    told = capsys.readouterr().err.strip()
    assert sentence in told
    assert "\n" not in told


def test_a_files_own_step_counts_whatever_its_name(folder, tmp_path, sampler_of, capsys):
    file = tmp_path / "one.safetensors"
    file.write_bytes(checkpoint_files(folder.path)[1].read_bytes())
    assert "no saved step 3; the nearest is 30" in said(capsys, file, "--steps", 3)
    assert sampler_of(file, "--steps", 30).path == file


@pytest.mark.slow
def test_what_lies_ahead_is_told_before_the_bar(folder, capsys):
    def ahead():
        return describe_work(folder.path, QUICK, mode="").partition(": ")[2]

    moves = f"(4 + 6) moves of {QUICK.kernel} with lr {QUICK.lr:g}"
    assert ahead() == f"2 steps, 2 chains x {moves}; finished steps are stored."
    assert main(["llc", str(folder.path), "--steps", "last"]) in (0, 1)
    told = capsys.readouterr().err
    assert told.startswith(f"LLC of {folder.path}: 1 step, 2 chains x {moves}; finished steps are stored.\n")
    assert ahead() == f"1 of 2 steps to do, 2 chains x {moves}; finished steps are stored."
    main(["llc", str(folder.path)])
    assert ahead() == "nothing to do, all 2 steps are stored."


def test_an_interrupted_calibration_says_that_it_continues(folder, monkeypatch, capsys):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(llc, "_calibrate", interrupted)
    assert main(["llc", str(folder.path), "--calibrate"]) == 130
    assert "Run the same command again to continue" in capsys.readouterr().err


def test_words_may_come_in_any_order():
    options = llc_parser().parse_args(["--steps", "1", "2,3", "run", "--published", "--sampler.lr=1"])
    assert (options.path, options.flags, options.steps) == ("run", ["published"], "1,2,3")
    assert options.settings == {"sampler.lr": "1"}


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["llc", "--help"])
    told = capsys.readouterr().out
    assert "--sampler.localization" in told
    assert "--calibrate" in told
    assert "--task.num_tasks" not in told


# The sampler is no part of what is trained


def test_the_sampler_is_in_no_runs_name_and_has_a_name_of_its_own():
    plain = RunConfig()
    other = dataclasses.replace(plain, sampler=dataclasses.replace(plain.sampler, lr=1e-5, nbeta=None))
    assert run_name(plain) == run_name(other) == "quickstart"
    assert sampler_name(plain) == "preset"
    assert sampler_name(other) == "lr=1e-05,nbeta=None"
    assert run_name(RunConfig(optim=dataclasses.replace(plain.optim, lr=1e-3))) == "quickstart,lr=0.001"


def test_a_run_resumes_under_another_sampler(folder):
    from icl.config import config_differences
    from icl.runs.folder import require_same_config

    other = dataclasses.replace(CONFIG, sampler=dataclasses.replace(QUICK, lr=0.5))
    assert config_differences(CONFIG, other) == []
    require_same_config(CONFIG, other, folder)


def test_presets_set_their_own_nbeta():
    for name in ("quickstart", "L2H4", "raventos-base", "raventos-small", "carroll", "icr"):
        sampler = preset(name).sampler
        assert sampler.nbeta is not None
        assert sampler.nbeta < sampler.num_samples / 14
        assert sampler.num_chains > 1
