"""Mixtures of dMMSE and ridge: models that are exact mixtures, coverage of the errors, limits, transitions, theory curve, the command."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from scipy.stats import multivariate_normal
from tiny_runs import TINY, change

from icl import evidence
from icl.analysis import NotApplicableError
from icl.analysis.mixture import Settings, analyse, findings, fit_rows, fits, reference, references
from icl.analysis.mixture.findings import RunFits, ladder_rows, transition_rows
from icl.analysis.mixture.fits import MAX_LOG_ODDS
from icl.analysis.mixture.theory import CurvePoints, fit_curve, log_odds, table_bits
from icl.analysis.seeds import over_seeds
from icl.bayes.particles import particle_filter
from icl.build import build_model
from icl.cli import main
from icl.config import SeedsConfig
from icl.plotting.mixture import plot
from icl.runs.checkpoints import save_checkpoint
from icl.runs.folder import RunFolder
from icl.runs.measure import Entry
from icl.tasks.priors import task_pool, task_sequence
from icl.tasks.prompts import Prompts, noise_law, sample_prompts, task_law, training_pool

WORLD = change(TINY, task={"num_tasks": 8, "task_size": 3, "max_examples": 6})
SETS = ("pretrain", "true")


def prompts(name, *, config=WORLD, count=200, step=0):
    return sample_prompts(config, stream=name, step=step, batch_size=count)


def bayes(pair, odds):
    """Return the predictions of the Bayes predictor with these prior log odds."""
    return pair.ridge + (odds + pair.log_ratio).sigmoid() * pair.difference


def noise(pair, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(pair.ridge.shape, generator=generator, dtype=torch.float64)


def row(rows, quantity, mixture, position="mean"):
    wanted = (quantity, mixture, position)
    (only,) = [each for each in rows if (each["quantity"], each["mixture"], each["position"]) == wanted]
    return only


@pytest.mark.parametrize("name", SETS)
def test_bayes_factors_are_those_of_plain_densities(name, monkeypatch):
    """The oracle multiplies densities of scipy, one prompt and one prefix at a time."""
    some = prompts(name, count=5)
    xs, ys = some.xs.double(), some.ys.double()
    tasks, variance = task_pool(8, 3, task_sequence(WORLD)).double(), WORLD.task.noise_variance
    found = reference(WORLD, name, some).pair.log_ratio
    assert found[:, 0].abs().max() == 0
    monkeypatch.setattr(evidence, "_TASKS_AT_ONCE", 15)  # chunks of three tasks
    torch.testing.assert_close(reference(WORLD, name, some).pair.log_ratio, found)
    for x, y, ratios in zip(xs.numpy(), ys.numpy(), found.numpy(), strict=True):
        for k in range(1, len(y)):
            noise_covariance = variance * np.eye(k)
            gaussian = multivariate_normal.pdf(y[:k], np.zeros(k), x[:k] @ x[:k].T + noise_covariance)
            discrete = [multivariate_normal.pdf(y[:k], x[:k] @ task, noise_covariance) for task in tasks.numpy()]
            assert ratios[k] == pytest.approx(math.log(np.mean(discrete) / gaussian), abs=1e-9)


SPARSE = change(WORLD, task={"task_size": 2, "prior": "sparse", "prior_density": 0.3})


def test_in_another_world_the_bayes_factors_are_those_of_its_prior():
    """The oracle sums the densities of scipy over the four sets of coordinates that are not zero."""
    some = prompts("pretrain", config=SPARSE, count=5)
    found = reference(SPARSE, "pretrain", some)
    assert not found.variance.any()  # the predictor is exact
    tasks, variance = training_pool(SPARSE).double().numpy(), SPARSE.task.noise_variance
    for x, y, ratios in zip(some.xs.double().numpy(), some.ys.double().numpy(), found.pair.log_ratio, strict=True):
        for k in range(1, len(y)):
            own, noise_covariance = x[:k], variance * np.eye(k)
            new = sum(
                0.3 ** sum(present)
                * 0.7 ** (2 - sum(present))
                * multivariate_normal.pdf(y[:k], np.zeros(k), own @ np.diag(present) @ own.T / 0.3 + noise_covariance)
                for present in ((0, 0), (0, 1), (1, 0), (1, 1))
            )
            discrete = [multivariate_normal.pdf(y[:k], own @ task, noise_covariance) for task in tasks]
            assert ratios[k].item() == pytest.approx(math.log(np.mean(discrete) / new), abs=1e-6)


def test_in_another_world_an_exact_mixture_has_its_own_log_odds():
    each = reference(SPARSE, "true", prompts("true", config=SPARSE))
    found = list(fit_rows(each, bayes(each.pair, -1.0)))
    assert row(found, "log_odds", "bayes")["value"] == pytest.approx(-1, abs=1e-6)
    assert row(found, "residual_share", "bayes")["value"] == pytest.approx(0, abs=1e-9)


LAPLACE = change(WORLD, task={"task_size": 1, "num_tasks": 4, "prior": "laplace"})


def laplace_mean(xs, ys, variance):
    """Return the posterior means of all targets for D = 1 under a Laplace prior of variance 1, by a sum over a fine grid of w."""
    grid = np.linspace(-12, 12, 24_001)
    log_posterior = np.tile(-math.sqrt(2) * np.abs(grid), (len(ys), 1))
    means = np.zeros(ys.shape)
    for k in range(ys.shape[1]):
        weights = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
        means[:, k] = xs[:, k] * (weights @ grid) / weights.sum(1)
        log_posterior -= (ys[:, k, None] - xs[:, k, None] * grid) ** 2 / (2 * variance)
    return torch.from_numpy(means)


@pytest.mark.slow
def test_an_estimated_bayes_predictor_makes_the_residual_too_large_by_its_share_of_the_variance(monkeypatch):
    """The model is a mixture with weight p and the exact Bayes predictor, so its expected residual is (1 - p)^2 times the predictor's variance.

    All prompts of one estimate share the filters' random numbers, so the errors are averaged over filters with 32 seeds.
    """
    some, weight = prompts("true", config=LAPLACE, count=64), 0.4
    exact = laplace_mean(some.xs.double().numpy()[..., 0], some.ys.double().numpy(), LAPLACE.task.noise_variance)
    residuals, variances = [], []
    for seed in range(32):
        seeded = partial(particle_filter, law=task_law(LAPLACE), noise=noise_law(LAPLACE), seed=seed)
        estimate = partial(seeded, noise_variance=LAPLACE.task.noise_variance)
        monkeypatch.setattr("icl.analysis.mixture.bayes", lambda config, xs, ys, estimate=estimate: estimate(xs, ys))
        each = reference(LAPLACE, "true", some)
        dmmse = each.pair.ridge + each.pair.difference
        fitted = list(fit_rows(each, exact + weight * (dmmse - exact)))
        assert row(fitted, "weight", "fixed")["value"] == pytest.approx(weight, abs=0.01)
        residuals.append(row(fitted, "residual", "fixed")["value"])
        variances.append(each.variance.mean().item())
    assert max(residuals) < max(variances)
    expected = (1 - weight) ** 2 * np.array(variances)
    errors = np.array(residuals) - expected
    allowed = 4 * errors.std(ddof=1) / len(errors) ** 0.5
    assert abs(errors.mean()) < allowed < expected.mean()


def test_the_mixture_is_the_posterior_mean_under_the_mixed_prior():
    """On prompts of which half are from each prior, the Bayes predictor with equal parts has the smallest loss."""
    pair = reference(WORLD, "pretrain", prompts("pretrain", count=4000)).pair
    other = reference(WORLD, "true", prompts("true", count=4000)).pair
    targets = [prompts(name, count=4000).ys.double() for name in SETS]

    def loss(odds):
        pairs = zip((pair, other), targets, strict=True)
        return sum((bayes(each, odds) - ys).square().mean().item() for each, ys in pairs)

    losses = [loss(odds) for odds in (-2.0, 0.0, 2.0)]
    assert losses[1] < min(losses[0], losses[2])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("truth", [-3.0, 0.0, 2.5])
def test_a_model_that_is_a_bayes_mixture_is_found_exactly(name, truth):
    each = reference(WORLD, name, prompts(name))
    rows = list(fit_rows(each, bayes(each.pair, truth)))
    for position in ("1", "2", "6", "mean"):
        found = row(rows, "log_odds", "bayes", position)
        assert found["value"] == pytest.approx(truth, abs=1e-6)
        assert found["verdict"] == "ok"
        assert row(rows, "residual", "bayes", position)["value"] < 1e-20
    assert row(rows, "residual_share", "fixed")["value"] > 1e-4  # a fixed weight is another model


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0])
def test_a_model_with_a_fixed_weight_is_found_exactly(name, truth):
    each = reference(WORLD, name, prompts(name))
    rows = list(fit_rows(each, each.pair.ridge + truth * each.pair.difference))
    for position in ("1", "4", "mean"):
        assert row(rows, "weight", "fixed", position)["value"] == pytest.approx(truth, abs=1e-12)
        assert row(rows, "residual", "fixed", position)["value"] < 1e-20
        assert row(rows, "weight", "fixed", position)["verdict"] == "ok"


def test_the_weight_is_the_relative_distance():
    """For squared distances: ((gap to ridge - gap to dMMSE) / separation + 1) / 2, as in the code of Wurgaft et al. 2025."""
    pair = reference(WORLD, "true", prompts("true")).pair
    model = pair.ridge + 0.4 * pair.difference + noise(pair, 0.5, 0)
    to_ridge, to_dmmse = ((model - pair.ridge - share * pair.difference).square().mean().item() for share in (0.0, 1.0))
    relative = ((to_ridge - to_dmmse) / pair.difference.square().mean().item() + 1) / 2
    assert fits.fit_fixed(pair, model).parameter.value[-1].item() == pytest.approx(relative)


def test_ridge_and_dmmse_are_the_limits():
    each = reference(WORLD, "true", prompts("true"))
    for share, limit in ((0.0, -MAX_LOG_ODDS), (1.0, MAX_LOG_ODDS)):
        rows = list(fit_rows(each, (each.pair.ridge + share * each.pair.difference).float().double()))
        found = row(rows, "log_odds", "bayes")
        assert found["value"] == limit
        assert math.isnan(found["stderr"])
        assert found["verdict"] == "suspect"
        assert ("dMMSE" if share else "ridge") in found["reasons"]
        assert row(rows, "residual_share", "bayes")["value"] < 1e-10


def test_errors_cover_the_truth():
    """The model is a mixture plus noise that differs between prompts. Of 120 intervals of 2 standard errors, about 5 % miss."""
    misses = {"weight": 0, "log_odds": 0}
    for seed in range(60):
        pair = reference(WORLD, "pretrain", prompts("pretrain", step=seed + 1, count=150)).pair
        # Prompts differ in how well the model predicts them.
        error = 0.4 * noise(pair, 1, seed)[:, :1].abs() * noise(pair, 1, 1000 + seed)
        for quantity, truth, fit in (
            ("weight", 0.6, fits.fit_fixed(pair, pair.ridge + 0.6 * pair.difference + error)),
            ("log_odds", 1.0, fits.fit_bayes(pair, bayes(pair, 1.0) + error)),
        ):
            misses[quantity] += bool((fit.parameter.value[-1] - truth).abs() > 2 * fit.parameter.stderr[-1])
    assert all(count <= 9 for count in misses.values())  # P(more than 9 of 60 at 5 %) is 0.0006
    assert sum(misses.values()) >= 1  # errors that are far too large never miss; P(0 of 120) is 0.002


def test_a_model_that_is_no_mixture_is_invalid():
    each = reference(WORLD, "true", prompts("true"))
    rows = list(fit_rows(each, -each.pair.ridge + noise(each.pair, 3.0, 0)))
    for quantity, mixture in (("weight", "fixed"), ("log_odds", "bayes")):
        assert row(rows, quantity, mixture)["verdict"] == "invalid"
        assert "no mixture explains" in row(rows, quantity, mixture)["reasons"]
    slightly = list(fit_rows(each, each.pair.ridge - 0.2 * each.pair.difference))
    assert row(slightly, "weight", "fixed")["value"] == 0
    assert "outside [0, 1]" in row(slightly, "weight", "fixed")["reasons"]


def run_of_mixtures(num_tasks, values, *, size=0.0):
    """Return a run whose saved steps are mixtures with weights sigmoid(eta) of the theory."""
    config = change(WORLD, task={"num_tasks": num_tasks})
    steps = [0, *(2**power for power in range(16))]
    references = {name: reference(config, name, prompts(name, config=config)) for name in SETS}
    errors = references["pretrain"].errors.mean(-1)
    advantage = float(errors[0] - errors[1]) / (2 * config.task.noise_variance)
    entries = []
    for number, step in enumerate(steps):
        point = (np.array([value], dtype=float) for value in (step, advantage, table_bits(num_tasks, 3)))
        odds = log_odds(*point, values).item()
        rows, arrays = [], {}
        for name, each in references.items():
            pair = each.pair
            predictions = pair.ridge + expit(odds) * pair.difference + noise(pair, size, number)
            rows += fit_rows(each, predictions)
            arrays[f"{name}/fixed"] = fits.fixed_scores(pair.difference, predictions - pair.ridge).numpy()
            arrays[f"{name}/bayes"] = fits.bayes_scores(pair, predictions - pair.ridge).numpy()
        entries.append(Entry(step, "digest", rows, arrays))
    known = [
        {"quantity": "loss_advantage", "distribution": "pretrain", "value": advantage},
        *(
            {"quantity": "separation", "distribution": name, "value": each.pair.difference.square().mean().item()}
            for name, each in references.items()
        ),
    ]
    return RunFits(f"M={num_tasks}", config.task, entries, known)


@pytest.mark.slow
def test_a_ladder_that_follows_the_theory_gives_its_numbers_back():
    truth = (0.4, 0.35, 0.06)
    runs = [run_of_mixtures(m, truth, size=0.02) for m in (4, 8, 16, 32, 64)]
    rows = ladder_rows(runs)
    for distribution in SETS:
        own = {each["quantity"]: each for each in rows if each["distribution"] == distribution and each["run"] == "all"}
        assert own["curve_r2"]["value"] > 0.99
        for name, value in zip(("alpha", "beta", "gamma"), truth, strict=True):
            found = own[f"curve_{name}"]
            assert abs(found["value"] - value) < 4 * found["stderr"] + 1e-3 * value
    crossings = []
    for each in runs:
        (found,) = [r for r in transition_rows(each) if (r["mixture"], r["distribution"]) == ("fixed", "true")]
        assert found["finding"] == "to dMMSE"
        (expected,) = [
            r["value"]
            for r in rows
            if r["quantity"] == "curve_step" and r["run"] == each.name and r["distribution"] == "true"
        ]
        assert found["value"] == pytest.approx(expected, rel=0.15)  # the steps differ by a factor of 2
        crossings.append(found["value"])
    assert all(a < b for a, b in pairwise(crossings))
    slopes = [r for r in rows if r["quantity"] == "growth_exponent" and r["mixture"] == "fixed"]
    logs = np.log1p(crossings)
    assert slopes[1]["value"] == pytest.approx(np.polyfit(np.log([4, 8, 16, 32, 64]), logs, 1)[0])


@pytest.mark.parametrize("exponents", [(0.5,), (0.5, 0.7), (0.5, 0.7, 1.2)])
def test_the_growth_over_seeds_is_that_of_each_seed(exponents, monkeypatch):
    """Transitions of seed s lie exactly on t + 1 = 10 M^a_s, so the spread of the exponents is known."""
    runs = [
        RunFits(str(exponent), change(WORLD, task={"num_tasks": m}).task, [], [], SeedsConfig(model=seed))
        for seed, exponent in enumerate(exponents)
        for m in (4, 8, 16, 32, 64)
    ]
    monkeypatch.setattr(
        findings,
        "last_transition",
        lambda run, *_: {"value": 10 * run.task.num_tasks ** float(run.name) - 1, "verdict": "ok"},
    )
    *own, whole = findings._growth_rows(runs, "true", "fixed")
    known = over_seeds(exponents)
    assert [row["value"] for row in own] == pytest.approx(list(exponents) if len(exponents) > 1 else [])
    assert whole["value"] == pytest.approx(known.mean)
    assert whole["run"] == "all"
    if len(exponents) > 1:
        assert whole["stderr"] == pytest.approx(known.stderr)
        assert whole["num_seeds"] == len(exponents)
        assert (whole["lower"], whole["upper"]) == pytest.approx((known.low, known.high), nan_ok=True)
        assert (whole["verdict"] == "ok") == (len(exponents) > 2)


def test_a_curve_without_enough_or_changing_points_is_refused():
    count = 8
    columns = [
        np.linspace(1, 100, count),
        np.ones(count),
        np.full(count, 1e4),
        np.full(count, 0.7),
        np.ones(count),
        np.zeros(count),
    ]
    assert fit_curve(CurvePoints(*columns)).verdict == "invalid"
    few = fit_curve(CurvePoints(*(column[:3] for column in columns)))
    assert few.verdict == "invalid"
    assert "only 3 saved steps" in few.reasons[0]


def saved_run(path, config, steps=(0, 1, 20)):
    folder = RunFolder(path)
    folder.write_config(config)
    for step in steps:
        model = build_model(change(config, seeds={"model": step}))
        save_checkpoint(folder.checkpoints, step, config, model.state_dict())
    return folder


QUICK = ["--what", "mixture", "--num_prompts", "32"]


def test_the_mixtures_of_a_run_from_the_command_line(tmp_path, capsys):
    folder = saved_run(tmp_path / "r", WORLD)
    assert main(["analyse", str(folder.path), *QUICK]) == 0
    assert "residual share" in capsys.readouterr().out
    assert (folder.figures / "mixture.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "mixture.csv")
    assert set(table["run"]) == {"all", "r"}
    weights = table[table["quantity"] == "weight"]
    assert set(weights["distribution"]) == set(SETS)
    assert set(weights["position"]) == {*map(str, range(1, 7)), "mean"}
    assert weights["value"].between(0, 1).all()
    assert set(weights["step"]) == {0, 1, 20}


@pytest.mark.slow
def test_the_mixtures_of_a_ladder_from_the_command_line(tmp_path, capsys):
    first, second = (saved_run(tmp_path / f"m{m}", change(WORLD, task={"num_tasks": m})) for m in (4, 8))
    assert main(["analyse", str(first.path), *QUICK, "--jointly_with", str(second.path)]) == 0
    assert "Growth of the transition" in capsys.readouterr().out
    table = pd.read_csv(first.results / "mixture.csv")
    assert set(table["run"]) == {"all", "m4", "m8"}
    assert len(plot(table, title="ladder").axes) == 8
    stored = sorted((first.results / "mixture").iterdir())
    times = [file.stat().st_mtime_ns for file in stored]
    again = analyse(first.path, Settings(num_prompts=32, jointly_with=str(second.path)))
    assert [file.stat().st_mtime_ns for file in stored] == times  # no step is measured again
    assert len(again.table) == len(table)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": math.inf}, "M = inf"),
        ({"noise_variance": 0.0}, "needs noise"),
        ({"pool": "walk", "pool_steps": 9}, "`task.pool` = walk"),
    ],
)
def test_a_run_without_mixtures_is_refused_in_one_sentence(tmp_path, capsys, settings, said):
    folder = saved_run(tmp_path / "r", change(WORLD, task=settings), steps=(0,))
    with pytest.raises(NotApplicableError, match=said):
        analyse(folder.path, Settings())
    assert main(["analyse", str(folder.path), "--what", "mixture"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder.results / "mixture").exists()


def test_all_analyses_leave_out_what_a_run_cannot_have(tmp_path, monkeypatch, capsys):
    from icl.analysis import ANALYSES

    monkeypatch.setattr("icl.cli.analyse.ANALYSES", {name: ANALYSES[name] for name in ("mixture", "embeddings")})
    folder = saved_run(tmp_path / "r", change(WORLD, task={"num_tasks": math.inf}), steps=(0,))
    assert main(["analyse", str(folder.path), "--what", "all"]) == 0
    assert "mixture is left out" in capsys.readouterr().err


def test_runs_that_are_no_ladder_are_refused(tmp_path, capsys):
    first = saved_run(tmp_path / "a", WORLD, steps=(0,))
    second = saved_run(tmp_path / "b", change(WORLD, task={"noise_variance": 0.5}), steps=(0,))
    assert main(["analyse", str(first.path), "--what", "mixture", "--jointly_with", str(second.path)]) == 2
    assert "must form a ladder" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"max_examples": 1}, {"num_tasks": 1}, {"task_size": 1, "num_tasks": 2}])
def test_small_worlds_have_mixtures(settings):
    config = change(WORLD, task=settings)
    each = reference(config, "true", prompts("true", config=config))
    found = row(list(fit_rows(each, bayes(each.pair, -1.0))), "log_odds", "bayes")
    assert found["value"] == pytest.approx(-1, abs=1e-6)


def test_a_model_that_has_diverged_is_invalid():
    each = reference(WORLD, "true", prompts("true"))
    rows = list(fit_rows(each, each.pair.ridge * math.nan))
    assert {each["verdict"] for each in rows} == {"invalid"}


def test_prompts_are_those_of_the_evaluation():
    from icl.evaluation.sets import evaluation_set

    each = evaluation_set(WORLD, "true", num_prompts=32)
    pair = references(WORLD, 32)[1].pair
    assert isinstance(each.prompts, Prompts)
    torch.testing.assert_close(pair.ridge.float(), each.baselines["ridge"])
    torch.testing.assert_close((pair.ridge + pair.difference).float(), each.baselines["dmmse"], rtol=1e-3, atol=1e-4)
