"""The implicit prior: exact Bayes predictors as models, energy distances against loops and closed forms, the command."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl import rng
from icl.analysis import NotApplicableError
from icl.analysis.prior import Reference, Settings, analyse, energy, reference, rollouts, sample_rows
from icl.analysis.prior.energy import NUM_BLOCKS, Sample, energy_distance
from icl.analysis.prior.rollouts import bayes_prompts, estimate_tasks, make_draws, model_rollouts
from icl.bayes.gaussians import exact_components, read_exactly, start_state
from icl.bayes.posterior import choose_tasks, gaussian_posterior
from icl.build import build_model
from icl.cli import main
from icl.config.validation import ConfigError
from icl.metrics import Estimate
from icl.model.heads import Predictive
from icl.model.stacked import stack
from icl.runs.checkpoints import save_checkpoint
from icl.runs.folder import RunFolder
from icl.tasks import laws
from icl.tasks.priors import task_pool, task_sequence
from icl.tasks.prompts import noise_law, task_law, training_pool

WORLD = change(TINY, task={"num_tasks": 4, "task_size": 2, "max_examples": 6}, model={"output": "mixture"})
VARIANCE = WORLD.task.noise_variance
POOL = task_pool(4, 2, task_sequence(WORLD)).double()
CANDIDATES = ("pool", "gaussian")


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Energy distance


def distance(first, second):
    return energy_distance(Sample(first), Sample(second))


def test_the_energy_distance_is_that_of_a_double_loop():
    count = 3 * NUM_BLOCKS
    first, second = normal(count, 2).numpy(), normal(count, 2, seed=1).numpy() + 0.3

    def by_hand(x, y):
        across = sum(math.dist(a, b) for a in x for b in y) / (len(x) * len(y))
        within = [
            sum(math.dist(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
            for z in (x, y)
        ]
        return 2 * across - sum(within)

    found = distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found.value.item() == pytest.approx(by_hand(first, second), rel=1e-12)
    for block in (0, 17):
        kept = np.arange(count) // 3 != block
        assert found.deleted[block].item() == pytest.approx(by_hand(first[kept], second[kept]), rel=1e-12)
    variance = (NUM_BLOCKS - 1) * np.var(found.deleted.numpy())
    assert found.estimate.stderr.item() == pytest.approx(math.sqrt(variance))


def test_the_energy_distance_of_two_gaussians_is_the_closed_form():
    """For X ~ N(m, s^2), E|X| = s sqrt(2/pi) exp(-m^2 / (2 s^2)) + m erf(m / (s sqrt(2))). Differences of Gaussians are Gaussian."""

    def absolute(mean, variance):
        deviation = math.sqrt(variance)
        tail = deviation * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance))
        return tail + mean * math.erf(mean / (deviation * math.sqrt(2)))

    for mean, scale in ((0.5, 1.0), (0.0, 1.6), (0.3, 0.7)):
        expected = 2 * absolute(mean, 1 + scale**2) - absolute(0, 2) - absolute(0, 2 * scale**2)
        found = distance(normal(4096, 1), mean + scale * normal(4096, 1, seed=1)).estimate
        assert abs(found.value - expected) < 4 * found.stderr
        assert found.stderr < 0.25 * expected


def test_the_estimate_has_no_bias_and_its_error_is_right():
    """Over 300 pairs of samples of a shift of 1, the mean is the closed form, and the errors are those of the scatter."""
    found = [distance(normal(64, 1, seed=s), 1 + normal(64, 1, seed=1000 + s)).estimate for s in range(300)]
    values, stderrs = (np.array([float(number) for number in column]) for column in zip(*found, strict=True))
    mean, deviation = 1.0, math.sqrt(2)
    absolute = deviation * math.sqrt(2 / math.pi) * math.exp(-1 / 4) + mean * math.erf(mean / 2)
    expected = 2 * absolute - 2 * deviation * math.sqrt(2 / math.pi)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(300)
    # The scatter of 300 values is known to about 4 %. A jackknife of 32 blocks is slightly too large.
    assert 0.9 < stderrs.mean() / values.std() < 1.3


def test_equal_distributions_have_distance_zero_within_the_error():
    """Under equality the error is too large by a factor of sqrt(2), so fewer than 5 % of 200 values exceed 2 of them."""
    found = [distance(normal(128, 2, seed=s), normal(128, 2, seed=1000 + s)).estimate for s in range(200)]
    z = np.array([float(each.value / each.stderr) for each in found])
    assert (z > 2).sum() <= 18  # P(more than 18 of 200 at 5 %) is 0.006
    assert abs(np.mean([float(each.value) for each in found])) < 4 * np.std([float(e.value) for e in found]) / 200**0.5
    assert (z < 0).mean() > 0.3  # an unbiased estimate is often negative


# Exact Bayes predictors as models


def dmmse_next(xs, ys):
    """Return the predictive distribution of dMMSE: a Gaussian for each task, with its posterior weight."""
    xs, ys = xs.double(), ys.double()
    squares = (xs[:, :-1] @ POOL.T - ys[0, :, :-1, None]).square().sum(1)  # B M
    log_weights = (-squares / (2 * VARIANCE)).log_softmax(-1)
    means = xs[:, -1] @ POOL.T
    return Predictive(*(part.unsqueeze(0) for part in (log_weights, means, torch.full_like(means, math.log(VARIANCE)))))


def ridge_next(xs, ys):
    """Return the predictive distribution of ridge, from the posterior of w by a plain inverse."""
    before, after, x = xs[:, :-1].double(), ys[0, :, :-1].double(), xs[:, -1].double()
    covariance = torch.linalg.inv(before.mT @ before / VARIANCE + torch.eye(2, dtype=torch.float64))  # B D D
    mean = (covariance @ before.mT @ after.unsqueeze(-1) / VARIANCE).squeeze(-1)
    variance = (x.unsqueeze(1) @ covariance @ x.unsqueeze(-1)).squeeze(-1) + VARIANCE  # B 1
    prediction = (x * mean).sum(-1, keepdim=True)
    return Predictive(*(part.unsqueeze(0) for part in (torch.zeros_like(prediction), prediction, variance.log())))


MODELS = {"pool": dmmse_next, "gaussian": ridge_next}


def rows_of(predict_next, settings, known=None):
    known = known or reference(WORLD, settings)
    targets = rollouts.rollouts(predict_next, known.draws, num_context=settings.num_context)[0]
    return list(sample_rows(known, estimate_tasks(known.draws.xs, targets, noise_variance=VARIANCE)))


def row(rows, quantity, candidate=""):
    (only,) = [each for each in rows if (each["quantity"], each["candidate"]) == (quantity, candidate)]
    return only


@pytest.mark.parametrize("num_context", [0, 2])
@pytest.mark.parametrize("own", CANDIDATES)
def test_the_exact_bayes_predictor_has_its_own_prior(own, num_context):
    other = next(name for name in CANDIDATES if name != own)
    rows = rows_of(MODELS[own], Settings(num_samples=2048, num_context=num_context, context="true"))
    to_own, to_other = (row(rows, "energy_distance", name) for name in (own, other))
    assert abs(to_own["value"]) < 2 * to_own["stderr"]
    assert to_own["finding"] == "zero within the error"
    assert to_other["value"] > 6 * to_other["stderr"]
    assert to_other["finding"] == "not zero"
    preference = row(rows, "preference")
    assert (preference["finding"], preference["verdict"]) == (own, "ok")
    assert abs(row(rows, "energy_share", own)["value"]) < 0.1
    assert row(rows, "energy_share", other)["value"] == pytest.approx(1, abs=0.3)


def test_a_model_between_the_priors_and_one_far_from_both():
    settings = Settings(num_samples=1024)

    def twice_as_sure(xs, ys):
        """Believe in tasks of twice the size."""
        wide = dmmse_next(xs, ys / 2)
        return Predictive(wide.log_weights, 2 * wide.means, wide.log_variances + math.log(4))

    far = row(rows_of(lambda xs, ys: Predictive(*(20.0 + part for part in ridge_next(xs, ys))), settings), "preference")
    assert far["verdict"] == "invalid"
    assert "neither prior explains" in far["reasons"]
    strange = row(rows_of(twice_as_sure, settings), "preference")
    assert strange["verdict"] in ("suspect", "invalid")
    assert "neither prior explains" in strange["reasons"]
    broken = rows_of(lambda xs, ys: Predictive(*(math.nan * part for part in ridge_next(xs, ys))), settings)
    assert {each["verdict"] for each in broken} == {"invalid"}


def test_priors_that_cannot_be_told_apart_have_no_preference():
    same = normal(64, 2)
    known = Reference(None, {"pool": Sample(same), "gaussian": Sample(normal(64, 2, seed=1))})
    found = row(sample_rows(known, normal(64, 2, seed=2)), "preference")
    assert (found["finding"], found["verdict"]) == ("unclear", "invalid")
    assert "do not distinguish the two priors" in found["reasons"]


# Other worlds

COMPONENTS = change(
    WORLD, task={"num_tasks": math.inf, "prior": "mixture", "prior_components": 3, "prior_between": 0.9}
)
HEAVY = {"prior": "laplace", "noise": "student_t", "noise_df": 3.0, "inputs": "ar1", "input_correlation": 0.5}


def mixture_next(xs, ys):
    """Return the predictive distribution under the mixture of Gaussians: a Gaussian for each component."""
    xs, ys = xs.double(), ys[0].double()
    state = start_state(exact_components(task_law(COMPONENTS), 2), len(xs), xs.device)
    for k in range(xs.shape[1] - 1):
        state = read_exactly(state, xs[:, k], ys[:, k], VARIANCE)
    x = xs[:, -1, None]  # B 1 D
    variances = (x.unsqueeze(-2) @ state.covariances @ x.unsqueeze(-1))[..., 0, 0] + VARIANCE
    parts = (state.log_weights.log_softmax(-1), (state.means * x).sum(-1), variances.log())
    return Predictive(*(part.unsqueeze(0) for part in parts))


@pytest.mark.parametrize("num_context", [0, 2])
def test_the_exact_predictor_of_another_prior_has_this_prior_and_not_a_gaussian_one(num_context):
    settings = Settings(num_samples=2048, num_context=num_context, context="true")
    known = reference(COMPONENTS, settings)
    assert known.pair == ("prior", "gaussian")
    rows = rows_of(mixture_next, settings, known)
    own, other = (row(rows, "energy_distance", name) for name in known.pair)
    assert abs(own["value"]) < 2 * own["stderr"]
    assert other["value"] > 6 * other["stderr"]
    assert (row(rows, "preference")["finding"], row(rows, "preference")["verdict"]) == ("prior", "ok")
    assert row(rows_of(ridge_next, settings, known), "preference")["finding"] == "gaussian"


def test_prompts_of_candidates_have_the_inputs_and_the_noise_of_the_run():
    config = change(WORLD, task=HEAVY)
    assert list(reference(config, Settings(num_samples=64)).samples) == ["pool", "prior", "gaussian"]
    draws = make_draws(config, "prior", 4096, "pretrain")
    product = (draws.xs[:, 0] * draws.xs[:, 1]).mean(-1)
    assert abs(product.mean() - 0.5) < 4 * product.std() / 64
    exact = laws.draw(noise_law(config), rng.stream(config.seeds.evaluation, "prior/prior/noise-of-targets"),
                      torch.zeros(1, dtype=torch.int64), torch.arange(4096), 6)[0]  # fmt: skip
    assert torch.equal(draws.noise, exact)
    targets = bayes_prompts(config, "prior", draws, num_context=0)
    ws = laws.draw_tasks(task_law(config), rng.stream(config.seeds.evaluation, "prior/prior/tasks-given-examples"),
                         torch.zeros(1, dtype=torch.int64), torch.arange(4096), 2)[0]  # fmt: skip
    expected = (draws.xs @ ws.unsqueeze(-1)).squeeze(-1) + VARIANCE**0.5 * exact
    torch.testing.assert_close(targets, expected.double(), rtol=1e-5, atol=1e-5)


def test_a_pool_that_moves_is_compared_at_each_step_with_the_pool_of_its_last_update(tmp_path):
    config = change(WORLD, task={"pool": "walk", "pool_steps": 5})
    folder = saved_run(tmp_path / "r", config)
    table = analyse(folder.path, Settings(num_samples=64, num_context=1)).table
    squares = table[(table["quantity"] == "mean_square") & (table["candidate"] == "pool")].set_index("step")["value"]
    assert list(squares.index) == [0, 20]
    for step in (0, 20):
        draws = make_draws(config, "pool", 64, "pretrain", pool_step=max(step - 1, 0))
        pool = training_pool(config, step=max(step - 1, 0)).double()
        chosen = choose_tasks(draws.xs[:, :1].double(), draws.ys[:, :1].double(), pool, draws.uniforms[:, 0].double(),
                              noise_variance=VARIANCE)  # fmt: skip
        ys = (draws.xs.double() @ pool[chosen].unsqueeze(-1)).squeeze(-1) + VARIANCE**0.5 * draws.normals.double()
        ys[:, 0] = draws.ys[:, 0]
        found = estimate_tasks(draws.xs, ys, noise_variance=VARIANCE).square().mean().item()
        assert squares[step] == pytest.approx(found)
    assert len(table[table["quantity"] == "separation"]) == 2


# References, rollouts and the estimator


def test_tasks_are_those_of_ridge_regression():
    xs, ys = normal(5, 6, 2), normal(3, 5, 6, seed=1)
    found = estimate_tasks(xs, ys, noise_variance=VARIANCE)
    for n in range(3):
        for b in range(5):
            x, y = xs[b].numpy(), ys[n, b].numpy()
            expected = np.linalg.solve(x.T @ x + VARIANCE * np.eye(2), x.T @ y)
            assert found[n, b].numpy() == pytest.approx(expected)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_prompts_of_a_candidate_are_ordinary_prompts_without_given_examples(candidate):
    """Their targets, divided by the noise, have the moments of w . x + noise."""
    draws = make_draws(WORLD, candidate, 8192, "pretrain")
    ys = bayes_prompts(WORLD, candidate, draws, num_context=0)
    xs = draws.xs.double()
    second = POOL.mT @ POOL / 4 if candidate == "pool" else torch.eye(2, dtype=torch.float64)
    expected = ((xs @ second) * xs).sum(-1) + VARIANCE  # the variance of y about 0, given x
    difference = (ys.square() - expected).flatten(1).mean(-1)
    assert abs(difference.mean()) < 4 * difference.std() / 8192**0.5
    product = (ys[:, 0] * ys[:, 1] - (xs[:, 0] @ second * xs[:, 1]).sum(-1)).double()  # one task for the whole prompt
    assert abs(product.mean()) < 4 * product.std() / 8192**0.5


def test_tasks_given_examples_are_those_of_the_posterior():
    """Of 40,000 draws given the same two examples, means and frequencies are the exact ones."""
    count, xs, ys = 40_000, normal(1, 2, 2), torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    many = xs.expand(count, -1, -1), ys.expand(count, -1)
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose_tasks(*many, POOL, uniforms, noise_variance=VARIANCE)
    likelihood = np.exp(-((xs[0] @ POOL.T - ys[0, :, None]).square().sum(0) / (2 * VARIANCE)).numpy())
    exact = likelihood / likelihood.sum()
    frequencies = np.bincount(chosen.numpy(), minlength=4) / count
    assert (np.abs(frequencies - exact) < 4 * np.sqrt(exact * (1 - exact) / count) + 1e-12).all()
    drawn = gaussian_posterior(*many, normal(count, 2, seed=3), noise_variance=VARIANCE)
    x, y = xs[0].numpy(), ys[0].numpy()
    covariance = np.linalg.inv(x.T @ x / VARIANCE + np.eye(2))
    stderr = np.sqrt(np.diag(covariance) / count)
    assert (np.abs(drawn.mean(0).numpy() - covariance @ x.T @ y / VARIANCE) < 4 * stderr).all()
    assert np.cov(drawn.T.numpy()) == pytest.approx(covariance, abs=0.03)


def test_rollouts_of_a_model_are_drawn_from_its_own_predictive_distributions():
    """The oracle asks the plain module for one target at a time, in float64."""
    models = [build_model(change(WORLD, seeds={"model": seed})) for seed in range(2)]
    params = stack([{name: tensor.detach() for name, tensor in model.named_parameters()} for model in models])
    draws = make_draws(WORLD, "model", 8, "pretrain")
    found = model_rollouts(WORLD.model, params, draws, num_context=2)
    assert torch.equal(found[:, :, :2], draws.ys[:, :2].expand(2, -1, -1))
    for targets, model in zip(found, models, strict=True):
        for k in range(2, 6):
            each = model.predictive(draws.xs, targets)
            weights = each.log_weights[:, k].exp().cumsum(-1)
            component = (weights[:, :-1] <= draws.uniforms[:, k, None]).sum(-1)
            rows = torch.arange(8)
            deviation = (each.log_variances[rows, k, component] / 2).exp()
            expected = each.means[rows, k, component] + deviation * draws.normals[:, k]
            torch.testing.assert_close(targets[:, k], expected.detach(), rtol=1e-4, atol=1e-5)


def test_draws_do_not_depend_on_their_number_and_differ_between_sets():
    few, many = (make_draws(WORLD, "model", count, "true") for count in (4, 9))
    assert all(map(torch.equal, few, (tensor[:4] for tensor in many)))
    other = make_draws(WORLD, "pool", 4, "true")
    assert not any(map(torch.equal, few, other))
    assert (many.uniforms >= 0).all()
    assert (many.uniforms <= 1).all()


# The command


def saved_run(path, config, steps=(0, 20)):
    folder = RunFolder(path)
    folder.write_config(config)
    for step in steps:
        save_checkpoint(
            folder.checkpoints, step, config, build_model(change(config, seeds={"model": step})).state_dict()
        )
    return folder


QUICK = ["--what", "prior", "--num_samples", "64"]


@pytest.mark.parametrize(
    ("world", "names"),
    [
        ({}, {"pool", "gaussian"}),
        ({"num_tasks": math.inf}, {"gaussian"}),
        (HEAVY, {"pool", "prior", "gaussian"}),
        ({"pool": "walk", "pool_steps": 5}, {"pool", "gaussian"}),
    ],
)
def test_the_prior_of_a_run_from_the_command_line(tmp_path, capsys, world, names):
    folder = saved_run(tmp_path / "r", change(WORLD, task=world))
    assert main(["analyse", str(folder.path), *QUICK]) == 0
    assert "energy distance gaussian" in capsys.readouterr().out
    assert (folder.figures / "prior.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(folder.results / "prior.csv", keep_default_na=False)
    distances = table[table["quantity"] == "energy_distance"]
    assert set(distances["candidate"]) == names
    assert set(distances["step"].astype(int)) == {0, 20}
    assert len(table[table["quantity"] == "preference"]) == (0 if len(names) == 1 else 2)
    stored = sorted((folder.results / "prior").iterdir())
    times = [file.stat().st_mtime_ns for file in stored]
    again = analyse(folder.path, Settings(num_samples=64))
    assert [file.stat().st_mtime_ns for file in stored] == times  # no step is measured again
    assert len(again.table) == len(table)


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        ("model", {"output": "token"}, "train one with `--model.output mixture`"),
        ("task", {"noise_variance": 0.0}, "needs noise"),
    ],
)
def test_a_run_that_cannot_write_prompts_is_refused_in_one_sentence(tmp_path, capsys, section, settings, said):
    folder = saved_run(tmp_path / "r", change(WORLD, **{section: settings}), steps=(0,))
    with pytest.raises(NotApplicableError, match=said):
        analyse(folder.path, Settings())
    assert main(["analyse", str(folder.path), "--what", "prior"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder.results / "prior").exists()


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be a multiple of 32"):
        Settings(num_samples=100)
    folder = saved_run(tmp_path / "r", WORLD, steps=(0,))
    with pytest.raises(ConfigError, match="`num_context` must be below K = 6"):
        analyse(folder.path, Settings(num_samples=64, num_context=6))


def test_an_energy_is_subtracted_block_by_block():
    first, second = (energy.Energy(torch.tensor(v), torch.full((NUM_BLOCKS,), v)) for v in (3.0, 1.0))
    assert (first - second).estimate == Estimate(torch.tensor(2.0), torch.tensor(0.0))
