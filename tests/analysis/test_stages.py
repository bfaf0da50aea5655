"""Stages: published stages are found within their errors, curves without stages have none, and every verdict has a reason."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from tiny_runs import TINY, change

from icl.analysis import stages
from icl.analysis.run import analyse
from icl.analysis.stages.agreement import RunBoundary, agree
from icl.analysis.stages.boundaries import find_boundaries
from icl.analysis.stages.points import Signal, mirrors_loss
from icl.analysis.stages.signals import read_signals
from icl.api import load_model
from icl.build import build_model
from icl.cli import main
from icl.config import LanguageConfig
from icl.config.validation import ConfigError
from icl.evaluation.sets import evaluation_set
from icl.plotting.llc import read_stages
from icl.plotting.stages import plot
from icl.presets import preset
from icl.runs.checkpoints import CheckpointError, save_checkpoint
from icl.runs.folder import RunError, RunFolder
from tools import verdict_rates

WORDS = dataclasses.replace(
    preset("language-quickstart"),
    language=LanguageConfig(vocab_size=12, context_size=20),
    model=dataclasses.replace(preset("language-quickstart").model, num_heads=2, embed_size=8),
)
ASKED = {"num_prompts": 8, "llc_settings": None, "worst_llc": "suspect", "longest": 1.0}
NBETA = 66.67
SAVED = np.unique(np.r_[500_000 ** np.linspace(0, 1, 100), np.linspace(0, 499_999, 100)].astype(int)).clip(max=499_999)
FEWER = SAVED[::2]
"""Where the words of a verdict are under test and not how exact a boundary is: half of the steps take a third of the time."""
ENDS = np.array([0, 1465, 40_292, 126_262, 318_181, 499_999])
LOSSES = 4.38 + np.cumsum([0, -0.320, -2.236, -0.069, -0.047, -0.033])
LLCS = np.cumsum([0, 21.41, 148.59, -12.35, -44.16, 3.56])
LLC_NOISE = 0.3
"""Of one published estimate: means of its ten chains differ by 0.01 in loss, 0.7 in the LLC, over sqrt(10); and
draws of deviation 35, over sqrt(50,000); rounded up (PAPERS 1.4 and 1.5)."""
LOSS_NOISE = 0.001
FLAT = {
    "constant": lambda times: 0 * times,
    "power law": lambda times: np.exp(-0.3 * times),
    "bent power law": lambda times: (1 + np.exp(times - 0.7 * times[-1])) ** -0.5,
    "sigmoid": lambda times: 1 / (1 + np.exp(-3 * (times - 0.6 * times[-1]))),
    "line in log time": lambda times: times / times[-1],
}


def staged(steps, levels, ends=ENDS):
    """Return a curve that moves from level to level and pauses at the end of every stage. Within a stage it is a cubic in log time."""
    times, edges = np.log1p(steps), np.log1p(ends)
    place = (np.searchsorted(edges, times, side="right") - 1).clip(0, len(ends) - 2)
    part = ((times - edges[place]) / (edges[place + 1] - edges[place])).clip(0, 1)
    return levels[place] + (levels[place + 1] - levels[place]) * part**2 * (3 - 2 * part)


def signal(name, steps, values, *, noise=0.0, seed=0, **columns):
    """Return points with normal noise."""
    rng = np.random.default_rng([seed, len(name)])
    about = {"step": steps, "checkpoint_hash": [f"{step:x}" for step in steps], "stderr": noise}
    return Signal(
        name, "made up", pd.DataFrame({**about, "value": values + noise * rng.normal(size=len(steps)), **columns})
    )


def published(seed, steps=SAVED):
    """Return a loss and an LLC with the published stages. The LLC's E[L] changes, so the LLC does not merely mirror the loss."""
    losses, llcs = staged(steps, LOSSES), staged(steps, LLCS)
    moving = {"init_loss": losses, "mean_loss": losses + llcs / 1000}
    return [
        signal("loss", steps, losses, noise=LOSS_NOISE, seed=seed),
        signal("llc", steps, llcs, noise=LLC_NOISE, seed=seed, **moving),
    ]


def found(signals, settings=stages.Settings()):  # noqa: B008
    """Return the curves, boundaries and stages of some signals."""
    fits = {one.name: stages.smooth_signal(one, settings) for one in signals}
    boundaries = agree(signals, fits, tolerance=settings.tolerance, least_change=settings.least_change)
    return boundaries, stages.divide(signals, fits, boundaries)


def usable(boundaries):
    """Return the boundaries that may bound stages."""
    return [one for one in boundaries if one.verdict != "invalid"]


def misses(boundaries):
    """Return how many standard errors the nearest found boundary is from each published boundary."""
    return [
        min(((one.time - math.log1p(end)) / one.stderr for one in boundaries), key=abs, default=math.inf)
        for end in ENDS[1:-1]
    ]


def write_tables(folder, signals):
    """Write the tables of a run, as `icl evaluate` and `icl llc` do."""
    for one in signals:
        points = one.points
        if one.name == "llc":
            extra = {"verdict": "ok", "reasons": "", "settings": "0e12", "mode": "", "rescale": 1.0}
            table = points.rename(columns={"value": "llc"}).assign(**extra)
            folder.write_result("llc.csv", table.to_csv(index=False))
        else:
            table = points.assign(distribution="pretrain", quantity=one.name, position="mean")
            folder.write_result("evaluation.csv", table.to_csv(index=False))
    return folder


# What is found


def test_the_published_stages_are_found_with_their_types_and_changes():
    boundaries, parts = found(published(0))
    assert [one.verdict for one in usable(boundaries)].count("ok") >= 3  # the LLC alone has the third at three errors
    assert len(usable(boundaries)) == 4
    assert np.abs(misses(usable(boundaries))).max() < 3
    assert [part.type for part in parts] == ["A", "A", "B", "B", "A"]
    for part, llc, loss in zip(parts, np.diff(LLCS), np.diff(LOSSES), strict=True):
        for name, truth in (("llc", llc), ("loss", loss)):
            change_found = part.changes[name]
            assert abs(change_found.value - truth) < 3.5 * change_found.stderr
            assert change_found.stderr < 0.35 * abs(truth)


@pytest.mark.slow
def test_published_boundaries_lie_within_two_of_their_errors_nineteen_times_in_twenty():
    off, extra = [], 0
    for seed in range(10):
        boundaries = usable(found(published(seed))[0])
        off += misses(boundaries)
        extra += len(boundaries) - 4
    assert extra == 0
    inside = np.mean(np.abs(off) < 2)
    assert inside > 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(off))
    assert np.abs(off).max() < 4


@pytest.mark.parametrize("name", FLAT)
def test_curves_without_stages_have_none(name):
    steps = SAVED[::4]
    curve = FLAT[name](np.log1p(steps))
    for noise in (0.003, 0.1):
        both = [
            signal("loss", steps, -curve, noise=noise, seed=1),
            signal("llc", steps, 10 * curve, noise=10 * noise, seed=2),
        ]
        boundaries, parts = found(both)
        assert not usable(boundaries)
        assert not parts


@pytest.mark.slow
@pytest.mark.parametrize("num_points", [28, 95])
def test_at_most_one_flat_curve_in_twenty_shows_a_boundary(num_points):
    steps = SAVED[np.linspace(0, len(SAVED) - 1, num_points).astype(int)]
    shown = []
    for seed in range(12):
        for number, flat in enumerate(FLAT.values()):
            curve, noise = flat(np.log1p(steps)), (0.003, 0.03, 0.1)[seed % 3]
            both = [
                signal("loss", steps, -curve, noise=noise, seed=100 * seed + number),
                signal("llc", steps, 10 * curve, noise=10 * noise, seed=100 * seed + number),
            ]
            shown.append(bool(usable(found(both)[0])))
    assert np.mean(shown) <= 0.05


def with_onsets(signals):
    """Return the signals of a language run, in which onsets are boundaries."""
    return [one._replace(has_onsets=True) for one in signals]


@pytest.mark.parametrize("name", ["constant", "power law", "line in log time"])
def test_curves_without_a_sudden_motion_have_no_onset(name):
    steps = SAVED[::4]
    curve = FLAT[name](np.log1p(steps))
    for noise in (0.003, 0.1):
        both = [
            signal("loss", steps, -curve, noise=noise, seed=1),
            signal("prefix_matching", steps, curve, noise=noise, seed=2),
        ]
        assert not usable(found(with_onsets(both))[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_onset_of_an_induction_head_is_a_boundary_only_in_language_runs(seed):
    """The score of a head rises from step 1,500 on, as in the language quickstart. The loss also falls at the start of training."""
    steps = np.unique(np.r_[0, np.geomspace(1, 3000, 30), np.linspace(0, 3000, 20)].astype(int))
    times, start = np.log1p(steps), math.log1p(1500)
    motion = ((times - start) / 0.3).clip(0, 1)
    both = [
        signal("loss", steps, 1.8 + 2 / (1 + np.exp(2 * (times - 3.5))) - 0.3 * motion, noise=0.005, seed=seed),
        signal("prefix_matching", steps, 0.02 + 0.5 * motion, noise=0.005, seed=seed),
    ]
    late = [one for one in usable(found(with_onsets(both))[0]) if one.time > math.log1p(500)]
    assert [one.verdict for one in late] == ["ok"]
    assert late[0].time == pytest.approx(start, abs=max(3 * late[0].stderr, 0.1))
    assert not any(one.verdict == "ok" for one in found(both)[0])


def coverage(phi, num_runs):
    """Return how many stated errors the change of a parabola over each half, and its turn, are from the truth."""
    steps = verdict_rates.STEPS
    middle, curve = (
        verdict_rates.TIMES[-1] / 2,
        40 * (1 - (verdict_rates.TIMES / (verdict_rates.TIMES[-1] / 2) - 1) ** 2),
    )
    changes, times = [], []
    for seed in range(num_runs):
        scatter = verdict_rates.autoregression(phi, len(steps), np.random.default_rng([seed, 5]))
        smooth = stages.smooth_signal(signal("loss", steps, curve + scatter), stages.Settings())
        halves = ((0.0, middle, 40), (middle, verdict_rates.TIMES[-1], -40))
        for start, end, truth in halves:
            found_change = stages._change(smooth.stated, (start, 0.0), (end, 0.0))
            changes.append((found_change.value - truth) / found_change.stderr)
        turns = [one for one in find_boundaries(smooth, least_change=0.01) if abs(one.time - middle) < 1.5]
        times += [(one.time - middle) / one.stderr for one in turns[:1]]
    return np.array(changes), np.array(times)


@pytest.mark.slow
def test_errors_of_changes_and_turns_cover_correlated_scatter():
    """Errors that took the scatter for independent were far too small: half of the changes were off by more than two of them."""
    for z in coverage(0.8, 6):
        assert np.sqrt(np.mean(z**2)) < 1.8  # for a correct error 1, with a standard error of 0.3 for six runs


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_two_errors_hold_nineteen_times_in_twenty_for_every_correlation(phi):
    for z in coverage(phi, 30):
        assert np.mean(np.abs(z) < 2) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 30)
        assert np.mean(z**2) > 0.1  # nor are the errors much too large


# Verdicts


def test_an_llc_that_mirrors_the_loss_is_no_signal_of_its_own():
    losses = published(0, FEWER)[0]
    init_loss = staged(FEWER, LOSSES)
    flat = {"init_loss": init_loss, "mean_loss": np.full(len(FEWER), 4.43)}
    mirror = signal("llc", FEWER, NBETA * (4.43 - init_loss), noise=LLC_NOISE, **flat)
    assert mirrors_loss(mirror, 6.0, 8.0)
    assert not mirrors_loss(published(0, FEWER)[1]._replace(name="loss"), 6.0, 8.0)
    boundaries, parts = found([losses, mirror])
    assert usable(boundaries)
    assert {one.verdict for one in usable(boundaries)} == {"suspect"}
    assert all("mirrors the loss" in one.reasons[0] for one in usable(boundaries) if len(one.candidates) == 2)
    assert all("mirrors the loss" in " ".join(part.reasons) for part in parts if part.type == "A")
    assert any(part.type == "A" for part in parts)


def test_one_signal_is_at_best_suspect_and_scores_of_the_loss_are_none_beside_it():
    loss = published(0, FEWER)[0]
    alone = usable(found([loss])[0])
    assert {(one.verdict, one.reasons) for one in alone} == {("suspect", ("there is no other signal",))}
    score = loss._replace(name="icl_score")
    both, parts = found([loss, score])
    assert {one.verdict for one in usable(both)} == {"suspect"}
    assert len(usable(both)[0].candidates) == 2
    assert {part.type for part in parts} == {"?"}


def test_signals_that_do_not_agree_are_not_counted_together():
    first = signal("loss", FEWER, staged(FEWER, np.array([4, 3, 2.0]), np.array([0, 1000, 499_999])), noise=0.003)
    second = signal("llc", FEWER, staged(FEWER, np.array([0, 50, 100.0]), np.array([0, 30_000, 499_999])), noise=0.3)
    boundaries = usable(found([first, second])[0])
    assert [(one.verdict, len(one.candidates)) for one in boundaries] == [("suspect", 1)] * 2
    assert boundaries[0].reasons == ("only loss shows it, not llc",)
    wide = stages.Settings(tolerance=4.0)
    assert [(one.verdict, len(one.candidates)) for one in usable(found([first, second], wide)[0])] == [("ok", 2)]


# Reading


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory):
    """Return a run with the tables of the published stages, analysed by the command."""
    folder = write_tables(RunFolder(tmp_path_factory.mktemp("runs") / "staged"), published(0, FEWER))
    assert main(["analyse", str(folder.path), "--what", "stages"]) == 0
    return folder


def test_the_command_writes_table_and_figure_and_the_llc_figure_finds_the_boundaries(staged_run):
    table = pd.read_csv(staged_run.results / "stages.csv")
    assert (staged_run.figures / "stages.png").read_bytes().startswith(b"\x89PNG")
    rows = table[table["quantity"] == "boundary"]
    assert read_stages(staged_run) == pytest.approx(sorted(rows["at"]))
    assert len(rows) == 4
    assert ((rows["low"] < rows["at"]) & (rows["at"] < rows["high"])).all()
    assert set(table["tolerance"]) == {0.25}
    assert set(table.loc[table["quantity"] == "measured", "signal"]) == {"loss", "llc"}


def test_the_figure_is_drawn_from_the_table_without_what_is_invalid(staged_run):
    table = pd.read_csv(staged_run.results / "stages.csv")
    figure = plot(table, title="x")
    assert len(figure.axes) == 4
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names == {"1A", "2A", "3B", "4B", "5A"}
    table.loc[table["quantity"] == "boundary", "verdict"] = "invalid"
    bare = plot(table, title="x")
    assert len(bare.axes[0].lines) == len(figure.axes[0].lines) - 4
    assert "no boundaries" in bare.get_suptitle()


def test_llc_estimates_are_of_one_kind_and_good_enough(tmp_path):
    folder = RunFolder(tmp_path / "r")
    kinds = [("a", "ok", 1.0, 10), ("b", "suspect", 1.0, 12), ("b", "invalid", 1.0, 3), ("c", "ok", 2.0, 20)]
    rows = [
        {"step": 10 * number + (verdict == "invalid"), "llc": 1.0 + number, "stderr": 0.1, "verdict": verdict,
         "reasons": "escaped: far", "settings": kind, "rescale": rescale}
        for kind, verdict, rescale, count in kinds
        for number in range(count)
    ]  # fmt: skip
    folder.write_result("llc.csv", pd.DataFrame(rows).to_csv(index=False))

    def read(**asked):
        return read_signals(folder.path, **(ASKED | asked))

    (llc,), missing = read()
    assert len(llc.points) == 12
    assert "settings b; 12 of 15 estimates, 12 suspect" in llc.source
    assert any("no loss" in one for one in missing)
    assert len(read(worst_llc="invalid")[0][0].points) == 15
    assert len(read(worst_llc="ok")[0][0].points) == 10
    assert len(read(llc_settings="c")[0][0].points) == 20
    with pytest.raises(ConfigError, match="no estimates under `d`; its settings are a, b, c"):
        read(llc_settings="d")
    with pytest.raises(RunError, match="a signal with at least 8 steps"):
        read(llc_settings="b", worst_llc="ok")


def test_the_loss_comes_from_the_first_source_that_has_it(tmp_path):
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(CheckpointError, match="There are no checkpoints at"):
        analyse("stages", folder.path)
    steps = list(range(0, 90, 10))
    metrics = pd.DataFrame({"step": steps, "eval/pretrain/loss": 1.0})
    folder.write_result("x.csv", "")
    folder.metrics_file.write_text(metrics.to_csv(index=False))
    assert [(one.name, one.source) for one in read_signals(folder.path, **ASKED)[0]] == [("loss", "metrics.csv")]
    folder.write_config(TINY)
    for step in steps:
        save_checkpoint(folder.checkpoints, step, TINY, build_model(change(TINY, seeds={"model": step})).state_dict())
    computed, missing = read_signals(folder.path, **ASKED)
    assert [one.name for one in computed] == ["loss", "icl_score", "prior_task_score"]
    assert {one.source for one in computed} == {"checkpoints"}
    assert "no LLC" in missing[0]
    table = pd.DataFrame(
        [
            {"step": step, "checkpoint_hash": "x", "distribution": "pretrain", "quantity": quantity, "position": position,
             "predictor": predictor, "value": 5.0, "stderr": 1.0}
            for step in steps
            for quantity, position in (("loss", "mean"), ("loss", "1"), ("icl_score", "1:2"), ("icl_score", "1:4"))
            for predictor in ("model", "ridge")
        ]
    )  # fmt: skip
    folder.write_result("behaviour.csv", table.to_csv(index=False))
    mixed = {one.name: one.source for one in read_signals(folder.path, **ASKED)[0]}
    assert mixed["loss"] == mixed["icl_score"] == "results/behaviour.csv"


def test_signals_of_a_language_run_are_those_of_the_heads_with_the_largest_scores(tmp_path):
    folder, steps = RunFolder(tmp_path / "r"), range(9)
    folder.write_config(WORDS)
    table = pd.DataFrame(
        [
            {"step": step, "checkpoint_hash": "x", "quantity": quantity, "part": part, "position": position,
             "value": step * size, "stderr": 0.1}
            for step in steps
            for quantity, part, position, size in (
                ("loss", "", "mean", 1), ("loss", "", "1", 9), ("icl_score", "", "2:9", 2), ("bigram_score", "", "", 3),
                ("previous_token", "0.1", "", 4), ("previous_token", "0.10", "", 5), ("prefix_matching", "1.2", "", 6),
                ("prefix_matching", "1.3", "", -6),
            )
        ]
    )  # fmt: skip
    folder.write_result("language-behaviour.csv", table.to_csv(index=False))
    signals, missing = read_signals(folder.path, **ASKED)
    assert {one.name: (one.points["value"].iloc[-1], one.group) for one in signals} == {
        "loss": (8, "loss"),
        "icl_score": (16, "loss"),
        "bigram_score": (24, "loss"),
        "previous_token": (40, "attention"),
        "prefix_matching": (48, "attention"),
    }
    assert [one.source.rpartition(" ")[2] for one in signals[-2:]] == ["0.10", "1.2"]
    assert len(missing) == 1
    assert "no LLC" in missing[0]
    flat = table.assign(value=table["value"].where(table["quantity"] != "previous_token", 0.03 + 0.001 * table["step"]))
    folder.write_result("language-behaviour.csv", flat.to_csv(index=False))
    signals, missing = read_signals(folder.path, **ASKED)
    assert "previous_token" not in {one.name for one in signals}
    assert (
        missing[0] == "There is no previous_token with at least 8 steps that rises by 3 standard errors over the run."
    )


def test_a_head_that_never_rises_is_no_signal_if_its_last_scores_are_missing(tmp_path):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(WORDS)
    steps = np.arange(10)
    rows = pd.DataFrame({"step": steps, "checkpoint_hash": "x", "quantity": "previous_token", "position": ""})
    heads = [rows.assign(part=part, value=np.where(steps < 9, level, np.nan), stderr=0.01)
             for part, level in (("h0", 0.9), ("h1", 0.1))]  # fmt: skip
    loss = rows.assign(quantity="loss", position="mean", part="", value=1.0 * steps, stderr=0.01)
    folder.write_result("language-behaviour.csv", pd.concat([*heads, loss]).to_csv(index=False))
    assert [one.name for one in read_signals(folder.path, **ASKED)[0]] == ["loss"]
    heads[0]["value"] = np.where(steps < 9, 0.1 * steps, np.nan)
    folder.write_result("language-behaviour.csv", pd.concat([*heads, loss]).to_csv(index=False))
    head = read_signals(folder.path, **ASKED)[0][1]
    assert (head.source.rpartition(" ")[2], head.points["step"].max()) == ("h0", 8)


def test_a_language_run_without_tables_has_the_loss_of_its_test_rows(tmp_path, capsys):
    folder = RunFolder(tmp_path / "r")
    folder.write_config(WORDS)
    for step in range(8):
        save_checkpoint(folder.checkpoints, step, WORDS, build_model(change(WORDS, seeds={"model": step})).state_dict())
    assert main(["analyse", str(folder.path), "--what", "stages", "--num_prompts", "8"]) == 0
    told = capsys.readouterr().out
    assert "There is no previous_token with at least 8 steps; measure it with `icl analyse" in told
    table = pd.read_csv(folder.results / "stages.csv")
    points = table[table["quantity"] == "measured"]
    assert set(points["signal"]) == {"loss", "icl_score"}
    assert set(table["family"]) == {"language"}
    rows = evaluation_set(WORDS, "test", num_prompts=8).prompts
    losses = -load_model(folder.path).double()(rows.xs).detach().log_softmax(-1).gather(-1, rows.ys[..., None])
    at_the_end = points[(points["signal"] == "loss") & (points["step"] == 7)]["value"]
    assert at_the_end.item() == pytest.approx(float(losses.mean()), rel=1e-6)
    assert "nats per token" in plot(table, title="x").axes[0].get_ylabel()


def log_spaced(num_steps):
    """Return step 0 and log-spaced steps to 500,000."""
    return np.r_[0, np.geomspace(1, 500_000, num_steps - 1).astype(int)]


@pytest.mark.parametrize("num_steps", [8, 12])
def test_signals_that_are_too_sparse_for_their_time_are_left_out(tmp_path, num_steps):
    """White noise at 8 log-spaced steps had a boundary in 9 of 24 runs. Its LLC has standard errors, so it is kept."""
    noise = [signal(name, log_spaced(num_steps), np.zeros(num_steps), noise=1.0, seed=3) for name in ("loss", "llc")]
    folder = write_tables(RunFolder(tmp_path / "r"), noise[:1])
    reason = (
        rf"The loss is left out: the {num_steps} steps in results/evaluation.csv are too far .* Save more checkpoints"
    )
    with pytest.raises(RunError, match=reason):
        analyse("stages", folder.path)
    signals, missing = read_signals(write_tables(folder, noise).path, **ASKED)
    assert [one.name for one in signals] == ["llc"]
    assert missing[0].startswith("The loss is left out")
    no_errors = noise[1]._replace(points=noise[1].points.assign(stderr=np.nan))
    with pytest.raises(RunError):
        read_signals(write_tables(folder, [no_errors]).path, **ASKED)


def test_dense_steps_are_enough_where_the_kernel_is_long_enough(tmp_path):
    folder = write_tables(RunFolder(tmp_path / "r"), [signal("loss", log_spaced(26), np.zeros(26), noise=1.0)])
    assert [one.name for one in read_signals(folder.path, **ASKED)[0]] == ["loss"]
    with pytest.raises(RunError, match=r"at most 0\.3 is allowed"):
        read_signals(folder.path, **(ASKED | {"longest": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [8, 12, 25])
def test_an_llc_of_white_noise_has_no_boundary_however_sparse_its_steps(num_steps):
    shown = [
        bool(usable(found([signal("llc", log_spaced(num_steps), np.zeros(num_steps), noise=1.0, seed=seed)])[0]))
        for seed in range(24)
    ]
    assert np.mean(shown) <= 0.05


def test_a_constant_or_a_file_are_answered_in_a_sentence(tmp_path, capsys):
    folder = RunFolder(tmp_path / "r")
    flat = signal("loss", np.arange(20), np.full(20, 2.0))
    write_tables(folder, [flat])
    assert main(["analyse", str(folder.path), "--what", "stages"]) == 0
    assert "No boundaries were found, so there are no stages." in capsys.readouterr().out
    assert read_stages(folder) == []
    file = tmp_path / "step-000000001.safetensors"
    file.write_bytes(b"x")
    assert main(["analyse", str(file), "--what", "stages", "--out", str(tmp_path / "x.csv")]) == 1
    assert "give the run's folder" in capsys.readouterr().err


def test_too_few_steps_are_told_where_there_are_any(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,eval/pretrain/loss\n1,2.0\n")
    with pytest.raises(RunError, match="a signal with at least 8 steps"):
        analyse("stages", tmp_path)


def test_an_llc_that_begins_late_says_from_which_steps_it_is_known():
    signals = published(0, FEWER)
    late = signals[1]._replace(points=signals[1].points[signals[1].points["step"] >= 10_000].reset_index(drop=True))
    _, parts = found([signals[0], late])
    assert parts[0].reasons[0] == "no type: the LLC is unknown"
    told = stages._stage_lines([signals[0], late], parts)
    span = f"{FEWER[FEWER >= 10_000][0]:,} to 499,999"
    assert any(f"the LLC is unknown for part of the stage (usable steps: {span})" in line for line in told)


def test_an_error_below_one_step_keeps_a_digit():
    assert [stages._error_text(error) for error in (0.0, 0.036, 0.36, 0.97, 1.2, 1234.5)] == [
        "0", "0.04", "0.4", "1", "1", "1,234"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"longest": 0.1}, "at least `shortest`"),
        ({"num_prompts": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        stages.Settings(**settings)


def test_verdicts_are_in_the_words_of_the_llc():
    assert set(RunBoundary.__annotations__["verdict"].__args__) == {"ok", "suspect", "invalid"}
