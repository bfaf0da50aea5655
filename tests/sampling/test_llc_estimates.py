"""LLC estimates of losses with known answers, their standard errors, and the verdicts that deliberately bad settings must get."""

import dataclasses
import inspect
import math

import pytest
import torch
from options import estimate_many, keywords
from tiny_runs import TINY

from icl.build import build_model
from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.sampling import estimate_llc, estimate_llcs, known, module_loss
from icl.sampling.verdict import RULES, judge
from icl.tasks.prompts import sample_prompts

H = torch.tensor([0.3, 1.0, 3.0])
GOOD = {
    "lr": 2e-3,
    "nbeta": 60.0,
    "localization": 10.0,
    "num_chains": 8,
    "num_draws": 600,
    "num_burnin_steps": 300,
    "seed": 0,
    "trivial_loss": 10.0,
}
TRUTH = known.quadratic_llc(H, nbeta=60.0, localization=10.0, lr=2e-3)
START = {"w": torch.zeros(3)}


def quadratic(params, batch):
    return (H * params["w"].square()).sum() / 2


def noisy(params, batch):
    """Add a minibatch's gradient noise and loss noise, both of mean zero, to the same loss."""
    return quadratic(params, batch) + batch @ params["w"] + batch.sum()


def minibatches(chain, draw):
    return 0.05 * torch.randn(3, generator=torch.Generator().manual_seed(10_000 * chain + draw))


def estimate(loss=quadratic, params=START, batches=(None,), **changes):
    return estimate_llc(loss, params, batches, **keywords(**{**GOOD, **changes}))


def test_the_keywords_of_the_function_of_one_checkpoint_are_the_settings_of_that_of_several():
    of_one, of_several = (inspect.signature(function).parameters for function in (estimate_llc, estimate_llcs))
    settings = {field.name for field in dataclasses.fields(ChainsConfig)} - {"thinning", "batch_size"}
    assert set(of_one) - {"params"} == set(of_several) - {"checkpoints", "settings"} | settings
    assert list(of_one)[:3] == ["loss", "params", "batches"]
    with pytest.raises(TypeError, match="temperature"):
        estimate(temperature=1.0)


# Known answers


def test_a_converged_quadratic_is_ok():
    result = estimate()
    assert result.verdict == "ok"
    assert result.reasons == ()
    assert result.llc == pytest.approx(TRUTH, abs=4 * result.stderr)
    assert result.init_loss == 0
    assert result.num_chains_used == 8


@pytest.mark.slow
def test_the_exact_answer_counts_the_minibatch_noise():
    result = estimate(noisy, batches=minibatches, num_init_batches=64)
    exact = known.quadratic_llc(H, nbeta=60.0, localization=10.0, lr=2e-3, gradient_variance=0.05**2)
    assert result.llc == pytest.approx(exact, abs=4 * result.stderr)
    assert result.init_loss_stderr == pytest.approx(0.05 * math.sqrt(3) / 8, rel=0.3)  # 64 batches


def test_noise_of_the_losses_alone_is_in_neither_the_estimate_nor_its_error():
    """A minibatch changes the losses of w and w0 by the same amount: here by 20 nats, while the LLC is 1.3."""
    calm = estimate(noisy, batches=minibatches, num_init_batches=64, **SHORT)
    loud = estimate(
        lambda params, batch: noisy(params, batch) + 7 * batch[0], batches=minibatches, num_init_batches=64, **SHORT
    )
    assert loud.llc == pytest.approx(calm.llc, rel=1e-4)
    assert loud.stderr == pytest.approx(calm.stderr, rel=1e-3)
    assert loud.init_loss_stderr > 3 * calm.init_loss_stderr


def test_a_checkpoint_at_which_one_minibatch_is_not_finite_is_suspect_and_the_rest_is_averaged():
    def spoilt(chain, draw):
        return minibatches(chain, draw) * (math.nan if chain == 3 else 1.0)

    result = estimate(noisy, batches=spoilt, **SHORT)
    assert (result.num_chains_used, result.verdict) == (7, "suspect")
    assert {"some data not finite", "bad minibatches"} <= broken(result)
    assert math.isfinite(result.llc)
    hopeless = estimate(noisy, batches=lambda chain, draw: torch.full((3,), math.nan), **SHORT)
    assert hopeless.verdict == "invalid"
    assert "checkpoint not finite" in broken(hopeless)


@pytest.mark.parametrize(("bad", "kernel"), [("loss", "sgld"), ("gradient", "rmsprop"), ("gradient", "baoab")])
def test_minibatches_that_are_not_finite_blame_the_data_and_not_the_step_size(bad, kernel):
    """Chains meet these minibatches only after the batches of the checkpoint's own loss. The square root at zero has a non-finite gradient."""

    def loss(params, batch):
        if bad == "gradient":
            return quadratic(params, None) + torch.where(batch > 0, 0 * params["w"], 1.0).sum().sqrt()
        return quadratic(params, None) + torch.where(batch > 0, math.nan, 0.0)

    def late(chain, draw):
        return torch.tensor(1.0 if draw == 100 + chain and chain < num_bad else -1.0)

    for num_bad, verdict in ((8, "invalid"), (2, "suspect")):
        result = estimate(loss, batches=late, kernel=kernel, num_init_batches=8, **SHORT)
        assert (result.num_bad_data, result.verdict) == (num_bad, verdict)
        assert result.reasons[0].startswith(f"{num_bad} of 8 chains are masked, because")
        assert "check the data" in result.reasons[0]
        assert not any("masked" in reason and "lower lr" in reason for reason in result.reasons)


def test_one_bad_batch_of_a_list_does_not_spoil_the_chains_of_baoab():
    """The control variate of every chain would include the gradient on this batch."""
    batches = [0.05 * torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(1000)]
    batches[-1] = batches[-1] / 0
    result = estimate(noisy, batches=batches, kernel="baoab", **{**SHORT, "num_draws": 200, "num_burnin_steps": 100})
    assert result.num_chains_used + result.num_bad_data == 8
    assert result.num_chains_used >= 6


@pytest.mark.slow
def test_standard_errors_cover():
    """Of 100 estimates, 95 percent should be within two standard errors. Three standard deviations of this share are 6.5 percent."""
    results = estimate_many(quadratic, [START] * 100, [None], **{**GOOD, "num_chains": 4, "num_draws": 1000})
    z = torch.tensor([(result.llc - TRUTH) / result.stderr for result in results])
    assert (z.abs() < 2).double().mean() > 0.95 - 0.065
    assert z.abs().median() > 0.4  # 0.67 for exact errors: they are not merely wide
    verdicts = [result.verdict for result in results]
    assert verdicts.count("ok") > 85


def test_nbeta_is_n_over_log_n_unless_it_is_given():
    result = estimate(nbeta=None, num_samples=300, num_draws=10, num_burnin_steps=0)
    assert result.settings.nbeta == pytest.approx(300 / math.log(300))
    assert result.wbic == pytest.approx(300 * result.mean_loss)
    assert estimate(num_draws=10, num_burnin_steps=0).wbic is None


def test_components_have_llcs_of_their_own_and_their_mean_is_the_llc():
    def components(params, batch):
        return 3 * H * params["w"].square() / 2

    result = estimate(components)
    assert float(result.llc_per_component.mean()) == pytest.approx(result.llc)
    each = torch.tensor([3 * known.quadratic_llc(h[None], nbeta=60.0, localization=10.0, lr=2e-3) for h in H])
    assert ((result.llc_per_component - each).abs() < 4 * result.stderr_per_component).all()
    table = result.to_dataframe(by="component")
    assert table["llc"].tolist() == pytest.approx(result.llc_per_component.tolist())
    assert set(table["nbeta"]) == {60.0}


@pytest.mark.slow
def test_singular_fluctuation_of_a_regular_model():
    """For linear regression with unit noise and NLL, nu = sum_i s_i / (2 (s_i + gamma / nbeta)), near p/2 (Watanabe 2009)."""
    generator = torch.Generator().manual_seed(0)
    xs, noise = torch.randn(500, 3, generator=generator), torch.randn(500, generator=generator)
    w = torch.linalg.lstsq(xs, noise).solution
    residual = noise - xs @ w

    def sample_losses(params):
        return (noise - xs @ params["w"]).square() / 2

    result = estimate(
        lambda params, batch: sample_losses(params).mean(),
        {"w": w},
        localization=1.0,
        sample_losses=sample_losses,
        num_samples=500,
        thinning=2,
    )
    # Exactly, for Gaussian w: Var[l] = r^2 x'Cx + (x'Cx)^2 / 2 with C the chain's covariance.
    hessian = xs.T @ xs / 500
    a = 60 * hessian + torch.eye(3)
    cov = torch.linalg.inv(a @ (torch.eye(3) - 2e-3 * a / 4))
    quad = ((xs @ cov) * xs).sum(1)
    expected = 30 * float((residual.square() * quad + quad.square() / 2).mean())
    assert result.fluctuation.singular_fluctuation == pytest.approx(expected, abs=4 * result.fluctuation.stderr)
    assert result.fluctuation.functional_variance == pytest.approx(result.fluctuation.singular_fluctuation * 500 / 30)
    assert expected == pytest.approx(1.5, rel=0.2)


def test_a_row_says_what_made_it():
    row = estimate(num_samples=1000, loss_name="quadratic", num_draws=20).to_dataframe().iloc[0]
    wanted = {"lr": 2e-3, "nbeta": 60, "localization": 10, "num_samples": 1000, "num_chains": 8, "num_chains_used": 8}
    wanted |= {"num_draws": 20, "num_burnin_steps": 300, "num_draws_used": 160, "loss_name": "quadratic", "seed": 0}
    assert {name: row[name] for name in wanted} == wanted
    assert {"step", "checkpoint_hash", "llc", "stderr", "init_loss", "mean_loss", "rhat", "ess", "verdict"} <= set(
        row.index
    )
    assert "chain" in estimate(num_draws=20).to_dataframe(by="chain")


# Sabotage

SHORT = {"num_draws": 150, "num_burnin_steps": 100}


def broken(result):
    return {rule.name for rule in RULES if rule.reason(result) is not None}


@pytest.mark.parametrize("factor", [3, 100])
def test_too_large_a_step_is_never_ok(factor):
    """At the larger step size the chains diverge. At the smaller one the estimate looks plausible, but is too high by over a fifth."""
    result = estimate(lr=factor * 6e-3)
    if math.isfinite(result.llc):
        assert result.llc > 1.2 * known.quadratic_llc(H, nbeta=60.0, localization=10.0)
        assert result.verdict != "ok"
    else:
        assert result.verdict == "invalid"
        assert "diverged" in result.reasons[0]


def dying(chains):
    """Return a loss that is NaN on the batches of some chains from move 120 on."""

    def loss(params, batch):
        return quadratic(params, batch) + torch.where(batch > 0, torch.nan, 0.0)

    return loss, lambda chain, draw: torch.tensor(float(chain in chains and draw > 120))


def test_one_dead_chain_of_eight_is_masked_counted_and_suspect():
    loss, batches = dying({3})
    result, healthy = estimate(loss, batches=batches, **SHORT), estimate(**SHORT)
    others = [chain for chain in range(8) if chain != 3]
    assert result.verdict == "suspect"
    assert result.num_chains_used == 7
    assert result.reasons[0].startswith("1 of 8 chains")
    assert result.llc_per_chain.isnan().tolist() == [chain == 3 for chain in range(8)]
    assert result.llc == pytest.approx(float(healthy.llc_per_chain[others].mean()))
    assert math.isfinite(result.stderr)
    assert math.isfinite(result.rhat)


def test_most_chains_dead_is_invalid():
    loss, batches = dying(set(range(5)))
    result = estimate(loss, batches=batches, **SHORT)
    assert (result.verdict, result.num_chains_used) == ("invalid", 3)
    loss, batches = dying(set(range(8)))
    result = estimate(loss, batches=batches, **SHORT)
    assert (result.verdict, result.num_chains_used) == ("invalid", 0)
    assert math.isnan(result.llc)


def test_a_chain_that_diverges_without_becoming_infinite_is_masked():
    """Chains diverge upwards or downwards from the checkpoint's loss."""

    def loss(params, batch):
        return quadratic(params, batch) + batch * (params["w"].detach() != 0).any()

    for far in (1e6, -1e6):
        result = estimate(loss, batches=lambda chain, draw: torch.tensor(far * (chain == 2) * (draw > 120)), **SHORT)  # noqa: B023
        assert result.num_chains_used == 7
        assert result.verdict == "suspect"


@pytest.mark.slow
def test_one_chain_is_suspect():
    result = estimate(num_chains=1, num_draws=3000)
    assert result.verdict == "suspect"
    assert math.isnan(result.rhat)
    assert "one chain" in broken(result)
    assert result.llc == pytest.approx(TRUTH, abs=4 * result.stderr)


def test_a_shared_minibatch_stream_is_suspect():
    shared = estimate(noisy, batches=lambda chain, draw: minibatches(0, draw), **SHORT)
    assert shared.verdict == "suspect"
    assert "shared minibatches" in broken(shared)
    assert "shared minibatches" not in broken(estimate(noisy, batches=minibatches, **SHORT))
    assert "shared minibatches" not in broken(estimate(**SHORT))  # the whole data is no minibatch


@pytest.mark.parametrize("localization", [10.0, 1000.0])
def test_a_checkpoint_that_is_not_a_minimum_is_not_ok(localization):
    """With a strong localization the chains do not find the lower loss, and the estimate is a plausible positive number."""
    result = estimate(params={"w": torch.tensor([0.3, 0.3, 0.3])}, localization=localization, lr=5e-4, **SHORT)
    assert result.verdict != "ok"
    assert "not at a minimum" in broken(result)
    if localization == 10.0:
        assert result.verdict == "invalid"
        assert result.llc < 0


def test_a_checkpoint_on_a_noisy_gradient_is_still_a_minimum():
    assert "not at a minimum" not in broken(estimate(noisy, batches=minibatches, **SHORT))


def plateau(params, batch):
    """Return the loss 1 - exp(-|w|^2 / 2s) with s = 0.01: a narrow well in a plateau at 1."""
    return 1 - (-params["w"].square().sum() / 0.02).exp()


def test_escaped_chains_are_invalid_and_seen_without_a_trivial_loss():
    """In four dimensions, the prior has standard deviation 1 and the well has width 0.1. So the loss rises to the plateau, by 30 nats."""
    start = {"w": torch.zeros(4)}
    run = {"nbeta": 30.0, "localization": 1.0, "lr": 1e-2, "num_draws": 400}
    told = estimate(plateau, start, trivial_loss=1.0, **run)
    assert told.llc == pytest.approx(30, rel=0.05)
    assert told.verdict == "invalid"
    assert told.reasons[0].startswith("escaped")
    untold = estimate(plateau, start, trivial_loss=None, **run)
    assert untold.verdict == "suspect"
    assert "rise exceeds pull" in broken(untold)
    assert any("escape from the basin was not checked" in reason for reason in untold.reasons)


def test_a_checkpoint_no_better_than_a_trivial_predictor_has_no_basin_to_stay_in():
    assert estimate(trivial_loss=-0.01, **SHORT).verdict == "invalid"


@pytest.mark.parametrize(
    ("nbeta", "localization", "lr", "trivial_loss"),
    [(500.0, 100.0, 1e-4, None), pytest.param(67.0, 6.7, 3e-4, 2.25, marks=pytest.mark.slow)],
)
def test_a_step_0_model_is_never_ok(nbeta, localization, lr, trivial_loss):
    """Try settings with strong localization and without a trivial loss, and the published settings."""
    model = build_model(TINY)
    loss, params = module_loss(model, torch.nn.functional.mse_loss)

    xs, ys, _ = sample_prompts(TINY, stream="train", step=0, batch_size=32 * 400)  # at once, as it is most of the time

    def prompts(chain, draw):
        batch = (100 * chain + draw) % 400
        rows = slice(32 * batch, 32 * (batch + 1))
        return (xs[rows], ys[rows]), ys[rows]

    run = {"num_chains": 4, "num_draws": 60, "num_burnin_steps": 30, "trivial_loss": trivial_loss}
    result = estimate(loss, params, prompts, nbeta=nbeta, localization=localization, lr=lr, **run)
    assert result.verdict != "ok"
    assert {"not at a minimum", "negative", "escaped"} & broken(result)


def test_a_saddle_whose_gradient_is_zero_is_suspect():
    """Ten directions have a minimum. One direction has two wells, each 3 nats below the checkpoint."""

    def saddle(params, batch):
        return params["w"].square().sum() / 2 - 0.35 * params["u"] ** 2 / 2 + params["u"] ** 4 / 4

    start = {"w": torch.zeros(10), "u": torch.zeros(())}
    result = estimate(saddle, start, nbeta=100.0, localization=1.0, lr=1e-3, num_burnin_steps=300)
    assert result.llc > 0
    assert "lower loss found" in broken(result)
    assert result.verdict == "suspect"


@pytest.mark.slow
def test_heat_is_found_where_nothing_holds_the_flat_directions():
    """At localization 0, the bias bound comes from moments that need no equilibrium. It equals the bias in `known.quadratic_llc`."""
    curvatures = torch.cat([torch.logspace(-1, 0.5, 5), torch.zeros(15)])

    def flat(params, batch):
        return (curvatures * params["w"].square()).sum() / 2

    settings = {"nbeta": 100.0, "localization": 0.0, "num_draws": 600, "num_burnin_steps": 300, "lr": 8e-3}
    result = estimate(flat, {"w": torch.zeros(20)}, **settings)
    truth = known.quadratic_llc(curvatures[:5], nbeta=100.0, localization=0.0, lr=8e-3)
    assert result.bias_bound == pytest.approx(truth - 2.5, abs=4 * result.bias_bound_stderr)
    assert "step size bias" in broken(result)


def test_chains_held_by_the_prior_alone_are_suspect():
    result = estimate(localization=1e4, lr=2e-5)
    assert result.llc < 0.02  # a number, but of the localisation
    assert result.verdict == "suspect"
    assert "prior dominated" in broken(result)


@pytest.mark.parametrize("localization", [5.0, 600.0])
def test_how_the_llc_answers_to_the_localisation_is_that_of_a_quadratic(localization):
    """The sensitivity is half the sum of s (1 - s), with s = nbeta h / (nbeta h + localization). Flat directions contribute nothing."""
    curvatures = torch.tensor([3.0, 1.0, 0.3, 0.0, 0.0, 0.0])

    def flat(params, batch):
        return (curvatures * params["w"].square()).sum() / 2

    lr = 0.1 / (180 + localization)
    settings = {"nbeta": 60.0, "lr": lr, "num_chains": 32, "num_draws": 400, "num_burnin_steps": 150}
    result = estimate(flat, {"w": torch.zeros(6)}, localization=localization, **settings)
    shares = 60 * curvatures / (60 * curvatures + localization)
    truth = float((shares * (1 - shares)).sum()) / 2
    assert result.sensitivity == pytest.approx(truth, abs=4 * result.sensitivity_stderr)
    assert result.sensitivity_stderr < 0.15
    outweighs = localization == 600  # there 0.82 of the LLC go with an e-fold of it
    assert ("localization outweighs" in broken(result)) == outweighs


@pytest.mark.slow
def test_a_localisation_that_outweighs_the_data_is_suspect_though_the_number_is_plausible():
    result = estimate(localization=1000.0, lr=1e-4, num_draws=600)
    assert 0.05 * TRUTH < result.llc < 0.2 * TRUTH
    assert result.verdict == "suspect"
    assert "prior-dominated: localization, not the data, decides the LLC" in " ".join(result.reasons)


def regression(start, *, batch_size, num_moves=2300, p=10, n=1000):
    """Return a linear regression (loss, parameters, minibatches) whose start is `start` standard deviations of the noise from the minimum."""
    generator = torch.Generator().manual_seed(5)
    xs = torch.randn(n, p, generator=generator)
    ys = xs @ torch.randn(p, generator=generator) + torch.randn(n, generator=generator)
    params = {"w": torch.linalg.lstsq(xs, ys).solution + start * torch.randn(p, generator=generator)}
    rows = torch.randint(n, (8, num_moves, batch_size), generator=generator)

    def loss(params, batch):
        return (batch[1] - batch[0] @ params["w"]).square().mean() / 2

    return loss, params, lambda chain, draw: (xs[rows[chain, draw]], ys[rows[chain, draw]])


@pytest.mark.slow
def test_a_localisation_that_outweighs_the_data_is_seen_through_the_noise_of_minibatches():
    """The localization has ten times the weight of the data, so the LLC is 5/11 nats instead of 5.

    The minibatch noise in the excess and in the pull is larger than both.
    """
    loss, params, batches = regression(0.0, batch_size=64)
    nbeta = 1000 / math.log(1000)
    lengths = {"num_chains": 8, "num_draws": 500, "thinning": 4, "num_burnin_steps": 300, "trivial_loss": 20.0}
    result = estimate(loss, params, batches, nbeta=nbeta, localization=10 * nbeta, lr=0.02 / (11 * nbeta), **lengths)
    truth = 5 * (1 / 11) * (10 / 11)
    assert result.sensitivity == pytest.approx(truth, abs=4 * result.sensitivity_stderr)
    assert result.sensitivity_stderr < 0.1 * truth
    assert "localization outweighs" in broken(result)


@pytest.mark.slow
def test_a_checkpoint_a_little_beside_its_minimum_is_told_by_more_batches():
    """The checkpoint is about 1.8 nats above the minimum, along ten directions. With 32 batches this is not certain, and a note says so."""
    loss, params, batches = regression(0.05, batch_size=64, num_moves=600)
    settings = {
        "nbeta": 145.0,
        "localization": 10.0,
        "lr": 2e-4,
        "num_chains": 8,
        "num_draws": 500,
        "num_burnin_steps": 100,
    }
    few, many = (
        estimate(loss, params, batches, num_init_batches=num, trivial_loss=20.0, **settings) for num in (32, 200)
    )
    assert many.drop_at_mean_stderr < 0.6 * few.drop_at_mean_stderr
    assert "drop not measurable" in broken(few)
    assert "lower loss at mean" in broken(many)


def test_half_precision_is_refused():
    """In 16 bits, moves smaller than the spacing of numbers are lost, but the noise is not. The estimate would be 1.5 times too high, and `ok`."""
    with pytest.raises(ConfigError, match=r"float32 or float64, got torch.bfloat16 in `w`"):
        estimate(quadratic, {"w": torch.zeros(3, dtype=torch.bfloat16)})


def test_too_short_a_burnin_drifts():
    result = estimate(num_burnin_steps=0, num_draws=150, lr=1e-4, num_chains=32)
    assert "drift" in broken(result)
    assert result.verdict == "suspect"


@pytest.mark.slow
def test_chains_too_short_to_fill_flat_directions_are_suspect_and_find_too_little():
    """The loss is a valley whose walls become steeper along its floor. So the LLC grows as the chains spread along the floor."""

    def valley(params, batch):
        return 0.1 * params["walls"].square().sum() * params["floor"].square().sum() / 2

    start = {"walls": torch.zeros(20), "floor": torch.zeros(20)}
    settings = {"lr": 1e-3, "localization": 10.0, "num_chains": 32}
    short = estimate(valley, start, num_burnin_steps=20, num_draws=40, **settings)
    long = estimate(valley, start, num_burnin_steps=300, num_draws=400, **settings)
    assert short.verdict == "suspect"
    assert "not spread out" in broken(short) - broken(long)
    assert "pull + spread is 44% of its equilibrium value d" in " ".join(short.reasons)
    assert long.llc > 3 * short.llc
    assert long.filled == pytest.approx(1, abs=0.02)


def test_every_rule_can_be_the_only_reason_and_names_its_source():
    """Each case starts from evidence without faults, and changes only the values that one rule uses."""
    healthy = estimate()
    assert judge(healthy) == ("ok", (), ())
    changes = {
        "checkpoint not finite": {"init_loss": math.nan},
        "bad minibatches": {"num_bad_batches": 2},
        "data not finite": {"num_chains_used": 3, "num_bad_data": 5},
        "some data not finite": {"num_chains_used": 7, "num_bad_data": 1},
        "lower loss found": {"lowest": -0.5},
        "rounded losses": {"rounding": 5.0},
        "diverged down": {"num_diverged_down": 1},
        "not significant": {"llc": 0.5, "stderr": 0.3, "pull": 5.0},
        "slight step size bias": {"bias_bound": 0.1 * healthy.llc},
        "most chains masked": {"num_chains_used": 3},
        "some chains masked": {"num_chains_used": 7},
        "negative": {"llc": -1.0},
        "escaped": {"mean_loss": 6.0},
        "escaping": {"mean_loss": 2.0},
        "rise exceeds pull": {"llc": healthy.llc, "pull": 0.1},
        "not at a minimum": {"descent": 1.0},
        "lower loss at mean": {"drop_at_mean": 1.0, "drop_at_mean_stderr": 0.01},
        "too few chains for the drop": {"num_chains": 3, "num_chains_used": 3, "ess": 500.0},
        "slightly lower loss at mean": {"drop_at_mean": 0.1 * healthy.llc, "drop_at_mean_stderr": 1e-3},
        "below zero": {"llc": -0.01, "stderr": 0.1},
        "above half of d": {"llc": 2.5, "pull": 5.0},
        "step size bias": {"bias_bound": 1.0},
        "mala acceptance": {"mala_acceptance": 0.4},
        "one chain": {"num_chains": 1, "num_chains_used": 1, "rhat": math.nan},
        "shared minibatches": {"share_batches": True},
        "r hat": {"rhat": 1.06},
        "effective sample size": {"ess": 99.0},
        "drift": {"drift": -0.5},
        "too short for drift": {"drift": math.nan},
        "rises with localization": {"sensitivity": -0.5, "sensitivity_stderr": 0.01},
        "prior dominated": {"spread": 2.0, "pull": 0.4, "llc": 0.2},
        "localization outweighs": {"sensitivity": 0.8 * healthy.llc, "sensitivity_stderr": 0.01},
        "mostly flat": {"spread": 1.6, "pull": 3.0},
        "target not reached": {"target_stderr": healthy.stderr / 2},
        "improper": {"localization": 0.0, "pull": 2.0},
        "localization counts": {"sensitivity": 0.5 * healthy.llc, "sensitivity_stderr": 0.01},
        "not spread out": {"llc": 1.0, "pull": 1.05, "spread": 0.0, "filled_stderr": 0.01},
        "drop not measurable": {"drop_at_mean_stderr": 0.2, "drop_at_mean_freedom": 100.0},
        "hardly spread out": {"pull": 2.4, "spread": 0.3, "filled_stderr": 0.05},
        "escape not checked": {"trivial_loss": None},
    }
    assert set(changes) == {rule.name for rule in RULES}
    for rule in RULES:
        evidence = dataclasses.replace(healthy, **changes[rule.name])
        found = [other.name for other in RULES if other.reason(evidence) is not None]
        assert rule.name in found
        assert len(judge(evidence)[1]) == len(found)
        assert judge(evidence)[0] == ("ok" if rule.level == "note" else rule.level)
        assert rule.source


def test_the_interval_is_students_t_and_wider_for_few_effective_draws():
    """By hand: Student's t with ESS / 10 degrees of freedom, and for an ESS below 400 a variance larger by 400 / ESS."""
    values = {"llc": 1.0, "stderr": 0.1, "bias_bound": 0.0, "num_chains_used": 4, "pull": 2.0, "spread": 1.0}
    healthy = dataclasses.replace(estimate(num_draws=10), **values)

    def half(**changes):
        low, high = dataclasses.replace(healthy, **changes).interval
        return high - 1.0, 1.0 - low

    t = (0.20211, 0.20860)  # 40 and 20 degrees of freedom
    assert half(ess=400.0) == pytest.approx((t[0], t[0]), rel=1e-4)
    assert half(ess=200.0) == pytest.approx((t[1] * 2**0.5, t[1] * 2**0.5), rel=1e-4)
    assert half(ess=200.0, num_chains_used=64) == pytest.approx((t[1], t[1]), rel=1e-4)
    assert half(ess=400.0, bias_bound=0.06) == pytest.approx((t[0], t[0] + 0.06), rel=1e-4)
    assert half(ess=400.0, bias_bound=0.04) == pytest.approx((t[0], t[0]), rel=1e-4)
    assert half(ess=400.0, spread=0.7) == pytest.approx((t[0] + 0.1, t[0]), rel=1e-4)  # pull + spread is 0.9 d
    assert half(ess=400.0, spread=0.9) == pytest.approx((t[0], t[0]), rel=1e-4)  # less than half of stderr


@pytest.mark.parametrize(
    ("kernel", "step", "thinning"),
    [
        ("baoab", 0.2, 1),
        pytest.param("baoab", 0.2, 5, marks=pytest.mark.slow),
        ("baoab", 1.5, 1),
        pytest.param("sgld", 0.2, 20, marks=pytest.mark.slow),
    ],
)
def test_the_sensitivity_is_right_if_draws_are_nearly_independent(kernel, step, thinning):
    """All directions have curvature 1, so the localization has a thousandth of the data's weight, and the sensitivity is d/2 s (1 - s)."""

    def noisy(params, batch):
        return params["w"].square().sum() / 2 + batch @ params["w"]

    def batches(chain, draw):
        return 0.003 * torch.randn(20, generator=torch.Generator().manual_seed(100_000 * chain + draw))

    lengths = {"num_chains": 4, "num_draws": 300, "num_burnin_steps": 100, "thinning": thinning, "trivial_loss": 100.0}
    settings = {"kernel": kernel, "lr": step / 1001, "nbeta": 1000.0, "localization": 1.0}
    result = estimate(noisy, {"w": torch.zeros(20)}, batches, **lengths, **settings)
    assert result.sensitivity == pytest.approx(10 * 1000 / 1001**2, abs=0.005)
    assert not broken(result) & {"localization outweighs", "localization counts"}


def test_a_saddle_that_the_localization_hides_is_not_ok():
    """Ten directions bend down with half the weight of the localization. The chains stay near the checkpoint, so there is no drop."""
    curvatures = torch.tensor([1.0] * 50 + [-0.05] * 10)

    def saddle(params, batch):
        return (curvatures * params["w"].square()).sum() / 2

    lengths = {"num_chains": 4, "num_draws": 1000, "num_burnin_steps": 200, "trivial_loss": 100.0}
    settings = {"kernel": "baoab", "lr": 0.5 / 1100, "nbeta": 1000.0, "localization": 100.0}
    result = estimate(saddle, {"w": torch.zeros(60)}, **lengths, **settings)
    shares = 1000 * curvatures / (1000 * curvatures + 100)
    assert result.sensitivity == pytest.approx(
        float((shares * (1 - shares)).sum()) / 2, abs=4 * result.sensitivity_stderr
    )
    assert broken(result) == {"rises with localization"}
    assert result.verdict == "suspect"


def test_many_chains_of_six_draws_are_not_ok():
    """All chains share a transient, which neither R-hat nor the drift can show in so few draws."""

    def bowl(params, batch):
        return params["w"].square().sum() / 2

    lengths = {"num_chains": 100, "num_draws": 6, "num_burnin_steps": 85, "trivial_loss": 100.0}
    result = estimate(bowl, {"w": torch.zeros(100)}, **lengths, lr=0.02 / 1010, nbeta=1000.0, localization=10.0)
    assert result.llc < known.quadratic_llc(torch.ones(100), nbeta=1000.0, localization=10.0) - 5 * result.stderr
    assert "too short for drift" in broken(result)


def test_the_fluctuation_of_short_chains_includes_the_variance_between_chains():
    """For L = w^2 / 2, the losses of samples x are (w - x)^2 / 2. So a loss varies by x^2 Var(w) + Var(w^2) / 4, and Var(w) = 1 / 61."""
    samples = torch.linspace(-1, 1, 11)

    def bowl(params, batch):
        return params["w"].square().sum() / 2

    def sample_losses(params):
        return (params["w"] - samples).square() / 2

    settings = {"lr": 0.15 / 61, "nbeta": 60.0, "localization": 1.0, "trivial_loss": 100.0}
    lengths = {"num_chains": 128, "num_draws": 40, "num_burnin_steps": 60}
    result = estimate(bowl, {"w": torch.zeros(1)}, sample_losses=sample_losses, **lengths, **settings)
    variance = 1 / 61 / (1 - 0.15 / 4)  # of SGLD with this step
    truth = 30 * float((samples.square() * variance + variance**2 / 2).mean())
    assert result.fluctuation.singular_fluctuation == pytest.approx(truth, abs=4 * result.fluctuation.stderr)
    assert result.fluctuation.stderr < 0.1 * truth


@pytest.mark.parametrize("is_fresh", [True, False], ids=["one of many batches", "all the data"])
def test_a_single_batch_has_no_error_only_if_it_is_all_the_data(is_fresh):
    """The gradient on a single minibatch is not zero, although the checkpoint is at the minimum of the mean loss."""

    def noisy(params, batch):
        return params["w"].square().sum() / 2 + (0 if batch is None else batch @ params["w"])

    def fresh(chain, draw):
        return 0.03 * torch.randn(20, generator=torch.Generator().manual_seed(100_000 * chain + draw))

    lengths = {"num_chains": 4, "num_draws": 200, "num_burnin_steps": 100, "num_init_batches": 1, "trivial_loss": 100.0}
    settings = {"kernel": "baoab", "lr": 0.02 / 1001, "nbeta": 1000.0, "localization": 1.0}
    result = estimate(noisy, {"w": torch.zeros(20)}, fresh if is_fresh else [None], **lengths, **settings)
    assert math.isnan(result.descent_stderr) == math.isnan(result.init_loss_stderr) == is_fresh
    assert "not at a minimum" not in broken(result)
    assert any("any number of nats" in reason for reason in result.reasons) == is_fresh


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate(num_draws=10).llc = 1.0
