"""Shifted prompts: each shift has the distribution of its name, satisfies its exact constraints, and is a pure function."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl.baselines import ols, ridge
from icl.config import RunConfig, SeedsConfig, TaskConfig
from icl.tasks.prompts import sample_prompts
from icl.tasks.shifts import SHIFTS, available_shifts, sample_shifted_prompts

NAMES = list(SHIFTS)
INPUT_SCALES = {
    f"input_scale_{name}": g for name, g in (("0.333", 1 / 3), ("0.5", 0.5), ("2", 2), ("3", 3), ("100", 100))
}
TASK_SCALES = {name.replace("input", "task"): scale for name, scale in INPUT_SCALES.items()}
D, K, VARIANCE, NUM = 4, 8, 0.125, 8000


def run(task_size=D, max_examples=K, noise_variance=VARIANCE, num_tasks=64, seed=0):
    task = TaskConfig(
        num_tasks=num_tasks, task_size=task_size, max_examples=max_examples, noise_variance=noise_variance
    )
    return RunConfig(task=task, seeds=SeedsConfig(evaluation=seed))


@cache
def large_draw(shift, config):
    return sample_shifted_prompts(config, shift, batch_size=NUM)


def draw(shift, config=None, batch_size=NUM, **options):
    if batch_size == NUM and not options:
        return large_draw(shift, config or run())  # a pure function, so it may be kept
    return sample_shifted_prompts(config or run(), shift, batch_size=batch_size, **options)


@cache
def clean(batch_size=NUM):
    return sample_prompts(run(), stream="true", step=0, batch_size=batch_size)


def residuals(prompts):
    """Return y - w . x, in float64."""
    xs, ys, ws = (part.double() for part in prompts)
    return ys - torch.einsum("bkd,bd->bk", xs, ws)


def assert_mean(values, expected, num_errors=4.5):
    """Check that the mean over independent rows is within some standard errors of `expected`."""
    error = (values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(len(values)))
    assert error.max() < num_errors, (values.mean(0), expected)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The contract of every shift


@pytest.mark.parametrize("shift", NAMES)
def test_prompts_have_the_promised_shapes(shift):
    xs, ys, ws = draw(shift, batch_size=5)
    assert (xs.shape, ys.shape, ws.shape) == ((5, K, D), (5, K), (5, D))
    assert xs.dtype == ys.dtype == ws.dtype == torch.float32
    assert all(part.isfinite().all() for part in (xs, ys, ws))


@pytest.mark.parametrize("shift", NAMES)
def test_prompts_are_a_function_of_their_arguments(shift):
    state = torch.get_rng_state()
    assert same(draw(shift, batch_size=20, step=3), draw(shift, batch_size=20, step=3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shift", NAMES)
@pytest.mark.parametrize(("small", "large"), [(1, 2), (3, 64), (100, 1001)])
def test_smaller_batch_is_the_beginning_of_a_larger_one_bitwise(shift, small, large):
    longer = draw(shift, batch_size=large)
    assert same(draw(shift, batch_size=small), [part[:small] for part in longer])


@pytest.mark.parametrize("shift", NAMES)
def test_prompts_differ_between_steps_and_seeds(shift):
    first = draw(shift, batch_size=20)
    for other in (draw(shift, batch_size=20, step=1), draw(shift, run(seed=1), batch_size=20)):
        assert not any((a == b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shift", NAMES)
def test_prompts_do_not_depend_on_the_training_tasks(shift):
    """The base is the true distribution for every M, so all runs of a sweep are tested on the same prompts."""
    assert same(draw(shift, run(num_tasks=1), 20), draw(shift, run(num_tasks=math.inf), 20))


@pytest.mark.parametrize("shift", NAMES)
def test_shift_changes_the_prompts(shift):
    before, after = clean(batch_size=50), draw(shift, batch_size=50)
    assert not torch.equal(before.ys, after.ys)
    assert after.ws.shape == before.ws.shape


@pytest.mark.parametrize("shift", NAMES)
def test_targets_follow_inputs_and_tasks_with_the_noise_of_the_run(shift):
    """The residuals y - w . x are those of the clean prompts. Only `label_noise` makes them larger."""
    noise, base = residuals(draw(shift)), residuals(clean())
    expected = (D + VARIANCE) / (D + 1) if shift == "label_noise" else VARIANCE
    assert_mean(noise.square().mean(1), expected)
    torch.testing.assert_close(noise, base * (expected / VARIANCE) ** 0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [name for name in NAMES if name != "label_noise"])
def test_without_noise_targets_are_exact(shift):
    prompts = draw(shift, run(noise_variance=0.0), 1000)
    torch.testing.assert_close(residuals(prompts) + prompts.ys, prompts.ys.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shift", NAMES)
@given(task_size=st.integers(2, 9), max_examples=st.integers(2, 9), step=st.integers(0, 2**40))
def test_every_size_of_prompt_will_do(shift, task_size, max_examples, step):
    xs, ys, ws = draw(shift, run(task_size, max_examples), 3, step=step)
    assert (xs.shape, ys.shape, ws.shape) == ((3, max_examples, task_size), (3, max_examples), (3, task_size))
    assert xs.isfinite().all()


@pytest.mark.parametrize("shift", [name for name in NAMES if not name.startswith("input_scale")])
def test_inputs_keep_their_mean_square(shift):
    """E |x|^2 = D at every position, except for the shifts that scale the inputs."""
    assert_mean(draw(shift).xs.double().square().sum(-1), D)


@pytest.mark.parametrize("shift", NAMES)
def test_inputs_are_centred(shift):
    assert_mean(draw(shift).xs.double().flatten(1), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", NAMES)
def test_prompts_on_cuda_are_those_on_the_cpu_bitwise(shift):
    assert same([part.cpu() for part in draw(shift, batch_size=20, device="cuda")], draw(shift, batch_size=20))


# Scales


@pytest.mark.parametrize(("shift", "scale"), INPUT_SCALES.items())
def test_scaled_inputs_are_the_clean_ones_times_g(shift, scale):
    before, after = clean(batch_size=50), draw(shift, batch_size=50)
    assert torch.equal(after.xs, scale * before.xs)
    assert torch.equal(after.ws, before.ws)
    assert_mean(draw(shift).xs.double().flatten(1).square(), scale**2)  # variance g^2, not g


@pytest.mark.parametrize(("shift", "scale"), TASK_SCALES.items())
def test_scaled_tasks_are_the_clean_ones_times_g(shift, scale):
    before, after = clean(batch_size=50), draw(shift, batch_size=50)
    assert torch.equal(after.ws, scale * before.ws)
    assert torch.equal(after.xs, before.xs)
    assert_mean(draw(shift).ws.double().square(), scale**2)


def test_scales_of_both_papers_are_there():
    scales = ("0.333", "0.5", "2", "3", "5", "10", "100")
    assert {f"{kind}_scale_{scale}" for kind in ("input", "task") for scale in scales} < set(NAMES)


# Inputs


def spectra(shift, task_size):
    """Return the decreasing eigenvalues of x's second moments within each of 200 prompts of 2,000 examples, one row for each prompt."""
    xs = draw(shift, run(task_size, 2000), 200).xs.double()
    return torch.linalg.eigvalsh(xs.mT @ xs / 2000).flip(-1)


def test_skewed_covariance_has_eigenvalues_falling_as_one_over_i_squared():
    """The eigenvalues are 1, 1/4, 1/9, 1/16, normalised to sum to D. The bias of the sample covariance's trace and determinant is small."""
    expected = 1 / torch.arange(1, 5).double() ** 2
    torch.testing.assert_close(
        spectra("skewed_covariance", 4).mean(0), 4 * expected / expected.sum(), rtol=0.01, atol=0
    )


@pytest.mark.parametrize(("task_size", "rank"), [(1, 1), (2, 1), (4, 2), (5, 2), (9, 4)])
def test_half_subspace_has_half_the_dimensions_all_alike(task_size, rank):
    found = spectra("half_subspace", task_size)
    assert (found[:, rank:] < 1e-6).all()
    torch.testing.assert_close(
        found[:, :rank].mean(0), torch.full((rank,), task_size / rank).double(), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("shift", ["skewed_covariance", "half_subspace"])
def test_axes_are_drawn_anew_for_each_prompt_and_favour_none(shift):
    """The second moments, averaged over prompts, are the identity matrix."""
    xs = draw(shift).xs.double()  # B K D
    moments = (xs.mT @ xs / K).flatten(1)  # B D*D
    assert_mean(moments, torch.eye(D).flatten())


def test_axes_are_uniform():
    """The main axis u of skewed inputs has E (u_1)^4 = 3 / (D (D + 2)), like a uniform point on the sphere."""
    xs = draw("skewed_covariance", run(3, 200), 3000).xs.double()
    axes = torch.linalg.eigh(xs.mT @ xs).eigenvectors[..., -1]  # B D
    assert_mean(axes**4, 3 / (3 * 5))


def test_axes_of_other_shifts_and_steps_are_independent():
    """In two dimensions, the main axes of two independent draws have the mean squared cosine 1/2."""
    config = run(2, 200)
    draws = [
        draw(name, config, 2000, step=step)
        for name, step in (("half_subspace", 0), ("half_subspace", 1), ("skewed_covariance", 0))
    ]
    axes = [torch.linalg.eigh(xs.double().mT @ xs.double()).eigenvectors[..., -1] for xs, _, _ in draws]  # B D
    for other in axes[1:]:
        assert_mean((axes[0] * other).sum(-1).square(), 0.5)


# Noise


@pytest.mark.parametrize("noise_variance", [0.0, 0.125, 1.0, 2.0])
def test_label_noise_is_one_before_targets_get_back_their_variance(noise_variance):
    """Var y = D + sigma^2, as without the shift. The variance of the noise is 1 / D of the signal's."""
    prompts = draw("label_noise", run(noise_variance=noise_variance))
    noise = residuals(prompts)
    assert_mean(prompts.ys.double().square().mean(1), D + noise_variance)
    assert_mean(noise.square().mean(1), (D + noise_variance) / (D + 1))
    assert_mean((prompts.ys - noise).square().mean(1), D * (D + noise_variance) / (D + 1))
    assert torch.equal(prompts.xs, clean().xs)


# Queries


@pytest.mark.parametrize("shift", ["random_quadrants", "orthogonal_query"])
def test_query_is_the_clean_one(shift):
    assert torch.equal(draw(shift, batch_size=50).xs[:, -1], clean(batch_size=50).xs[:, -1])


def test_examples_lie_in_one_quadrant():
    before, after = clean(), draw("random_quadrants")
    signs = after.xs[:, :-1].sign()
    assert torch.equal(signs, signs[:, :1].expand_as(signs))
    assert torch.equal(after.xs.abs(), before.xs.abs())


def test_quadrants_of_examples_and_query_are_uniform_and_independent():
    """Every sign is fair. So is every product of two signs, from the examples, from the query, or one from each."""
    xs = draw("random_quadrants").xs.double()
    signs = torch.cat((xs[:, 0], xs[:, -1]), dim=1).sign()  # B 2D
    assert_mean(signs, 0.0)
    pairs = torch.combinations(torch.arange(2 * D))
    assert_mean(signs[:, pairs].prod(-1), 0.0)


@pytest.mark.parametrize(("task_size", "max_examples"), [(2, 2), (2, 8), (4, 3), (4, 8), (8, 16)])
def test_query_is_orthogonal_to_every_example(task_size, max_examples):
    """This is exact up to the rounding of inputs to float32, even where K - 1 examples would span all D dimensions."""
    xs = draw("orthogonal_query", run(task_size, max_examples), 1000).xs.double()
    examples, query = xs[:, :-1], xs[:, -1:]
    products = (examples * query).sum(-1).abs()
    assert (products < 2e-7 * examples.norm(dim=-1) * query.norm(dim=-1)).all()


def test_examples_beside_an_orthogonal_query_fill_its_complement():
    """Their second moments are D / (D - 1) in every direction orthogonal to the query."""
    xs = draw("orthogonal_query").xs.double()
    direction = torch.nn.functional.normalize(xs[:, -1], dim=-1)
    expected = (torch.eye(D) - direction.unsqueeze(-1) * direction.unsqueeze(-2)) * D / (D - 1)
    moments = xs[:, :-1].mT @ xs[:, :-1] / (K - 1)
    assert_mean((moments - expected).flatten(1), 0.0)


def test_examples_say_nothing_about_an_orthogonal_query():
    """There ridge predicts 0, so its mean loss is that of predicting zero, |x|^2 + sigma^2."""
    xs, ys, _ = draw("orthogonal_query")
    last = ridge(xs, ys, noise_variance=VARIANCE)[:, -1]
    assert last.abs().max() < 1e-4
    assert_mean((last - ys[:, -1]).square().double(), D + VARIANCE)


def test_seen_query_is_one_of_the_examples_each_as_often():
    xs, before = draw("seen_query").xs, clean().xs
    assert torch.equal(xs[:, :-1], before[:, :-1])
    is_seen = (xs[:, :-1] == xs[:, -1:]).all(-1)  # B K-1
    assert (is_seen.sum(-1) == 1).all()
    assert_mean(is_seen.double(), 1 / (K - 1))


def test_seen_query_has_the_target_of_its_example_but_for_the_noise():
    xs, ys, _ = draw("seen_query", run(noise_variance=0.0), 500)
    torch.testing.assert_close(ols(xs, ys)[:, -1], ys[:, -1], rtol=1e-3, atol=1e-3)
    index = (xs[:, :-1] == xs[:, -1:]).all(-1).double().argmax(-1)
    noisy = draw("seen_query")
    same_input = (noisy.xs[:, :-1] == noisy.xs[:, -1:]).all(-1)
    twice = noisy.ys[:, -1] - noisy.ys[:, :-1][same_input]  # two independent noises
    assert torch.equal(ys[:, -1], ys[torch.arange(500), index])
    assert_mean(twice.double().square(), 2 * VARIANCE)


def test_shifts_about_the_query_say_so():
    about = {name for name, shift in SHIFTS.items() if shift.is_about_query}
    assert about == {"random_quadrants", "orthogonal_query", "seen_query"}


# At the door


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("input_scale_4", "input_scale_"), ("half_subspaces", "half_subspace"), ("label-noise", "label_noise"), ("", "")],
)
def test_unknown_shift_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"no shift `{wrong}`. Did you mean `{nearest}.*The shifts are input_scale"):
        draw(wrong, batch_size=2)


@pytest.mark.parametrize(("shift", "key"), [("orthogonal_query", "task_size"), ("seen_query", "max_examples")])
def test_prompts_too_small_for_a_shift_are_refused(shift, key):
    with pytest.raises(ValueError, match=f"`{shift}` needs `task.{key}` of at least 2, got 1"):
        draw(shift, run(**{key: 1}), 2)


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ((4, 8), set()),
        ((1, 8), {"orthogonal_query"}),
        ((4, 1), {"seen_query"}),
        ((1, 1), {"orthogonal_query", "seen_query"}),
    ],
)
def test_available_shifts_are_those_that_can_be_drawn(sizes, missing):
    names = available_shifts(run(*sizes))
    assert set(NAMES) - set(names) == missing
    assert all(draw(name, run(*sizes), 2).xs.isfinite().all() for name in names)
