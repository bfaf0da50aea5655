"""Compare `icl` with devinterp 1.3.2, an independent implementation: equal SGLD moves up to rounding, equal LLCs up to chance.

Both programs move by -(lr/2) (nbeta grad L + localization (w - w0)) + sqrt(lr) N(0, 1). Both record the minibatch loss before the
move, on the minibatch that gives the move its gradient. One convention differs. If there are t moves for each draw, devinterp
records the draw at the last of these moves, and `icl` at the first. So a burn-in of b moves there corresponds to b + t - 1 here.
"""

import math
import operator
import warnings

import pytest
import torch
from options import keywords
from tiny_runs import TINY, change
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from icl import rng
from icl.build import build_model
from icl.compute.step import adam_state, make_step
from icl.model.flat import layout_of
from icl.model.stacked import stack
from icl.sampling import estimate_llc
from icl.sampling.prompt_loss import trivial_loss
from icl.tasks.prompts import sample_prompts

pytest.importorskip("devinterp", reason='needs devinterp 1.3.2: pip install -e ".[bench]"')
CONFIG = change(TINY, task={"num_tasks": 2})
KERNEL = {"lr": 2e-4, "nbeta": 100.0, "localization": 100.0}
NUM_PROMPTS, BATCH_SIZE = 1024, 64
SEED = 3


@pytest.fixture(scope="module")
def prompts():
    """Return the sample from which both programs take their minibatches and the checkpoint's loss."""
    return sample_prompts(CONFIG, stream="llc", step=0, batch_size=NUM_PROMPTS)


def evaluate(model, batch):
    """Return a model's loss in the form that devinterp needs."""
    return (model(*batch) - batch[1]).square().mean()


def loss_of(model):
    """Return the same loss as a function of the parameters, and the parameters."""
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return lambda params, batch: (functional_call(model, params, tuple(batch)) - batch[1]).square().mean(), params


# The same numbers in


def test_driven_by_the_same_noise_and_minibatches_it_is_where_devinterp_is(prompts, monkeypatch):
    """Compare positions, losses and estimates of two chains after fifty moves in float64.

    A draw of devinterp has the position after the move; a draw of `icl` has the position before it.
    """
    model, sizes = build_model(CONFIG).double(), {"num_draws": 40, "num_burnin_steps": 10}
    batches, places = minibatches(prompts), []

    def noting(params):
        places.append(flat(params))
        return torch.zeros(1)

    found = estimate(model, batches, **sizes, sample_losses=noting, vectorize=False)
    places = torch.stack(places).unflatten(0, (2, 40))
    for chain in range(2):
        theirs, losses, llc = one_chain(model, batches, chain, monkeypatch, **sizes)
        torch.testing.assert_close(places[chain, 1:], theirs[:-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.loss_trace[chain], losses, rtol=1e-10, atol=0)
        assert llc == pytest.approx(100 * (float(found.loss_trace[chain].mean()) - 1), rel=1e-5)


def test_their_burnin_is_ours_less_the_moves_between_draws(prompts, monkeypatch):
    """With three moves for each draw, devinterp records the loss of the third move. So `icl` needs two more moves of burn-in."""
    model, batches = build_model(CONFIG).double(), minibatches(prompts)
    found = estimate(model, batches, num_draws=12, num_burnin_steps=10 + 2, thinning=3)
    for chain in range(2):
        _, losses, _ = one_chain(
            model, batches, chain, monkeypatch, num_draws=12, num_burnin_steps=10, num_steps_bw_draws=3
        )
        torch.testing.assert_close(found.loss_trace[chain], losses, rtol=1e-10, atol=0)


def minibatches(prompts):
    """Return minibatches in float64 that are drawn with replacement, different for each chain and move."""
    xs, ys = prompts.xs.double(), prompts.ys.double()

    def batches(chain, draw):
        generator = torch.Generator().manual_seed(1000 * draw + chain)
        chosen = torch.randint(NUM_PROMPTS, (BATCH_SIZE,), generator=generator)
        return xs[chosen], ys[chosen]

    return batches


def estimate(model, batches, **settings):
    loss, params = loss_of(model)
    return estimate_llc(loss, params, batches, **keywords(**KERNEL, **settings, num_chains=2, seed=SEED))


def one_chain(model, batches, chain, monkeypatch, **sizes):
    """Run one chain of devinterp on our minibatches and noise. Return the position after the move and the loss at each draw, and the LLC."""
    places, losses = [], []

    def noting(*, model, loss, **_):
        places.append(flat(dict(model.named_parameters())))
        losses.append(loss.detach().clone())

    num_moves = sizes["num_burnin_steps"] + sizes["num_draws"] * sizes.get("num_steps_bw_draws", 1)
    rows = [batches(chain, move) for move in range(num_moves)]
    loader = DataLoader(rows, batch_size=1, collate_fn=operator.itemgetter(0))
    noise = our_noise(model, chain)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "normal", lambda *, size, **_: next(noise).view(size))
        found = devinterps(model, loader, init_loss=1.0, callbacks=[noting], num_chains=1, **sizes)
    assert next(noise, None) is not None  # theirs drew from ours
    return torch.stack(places), torch.stack(losses), found["llc-chain/0"]


def our_noise(model, chain):
    """Return the noise of our chain of the only checkpoint, split into the parameters that devinterp moves one at a time."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(rng.stream(SEED, f"llc/noise/0/{chain}").low)
    while True:
        yield from torch.randn(sum(sizes), generator=generator, dtype=torch.float64).split(sizes)


def flat(params):
    return torch.cat([tensor.detach().flatten() for tensor in params.values()])


# Each with numbers of its own


@pytest.fixture(scope="module")
def trained():
    """Return the tiny run's model after four hundred steps. Its loss is less than half that of predicting zero."""
    model = build_model(CONFIG)
    params = stack([{name: p.detach() for name, p in model.named_parameters()}])
    state, layout = adam_state(params), layout_of(params)
    step, losses = make_step(CONFIG.model, CONFIG.optim, layout), []
    for number in range(400):
        prompts = sample_prompts(CONFIG, stream="train", step=number, batch_size=BATCH_SIZE)
        info = step(state, prompts.xs[None], prompts.ys[None], torch.tensor([1e-2]))
        losses.append(float(info.losses))
    model.load_state_dict({name: row[0] for name, row in layout.to_params(state.rows).items()})
    assert sum(losses[-50:]) / 50 < trivial_loss(CONFIG) / 2
    return model


@pytest.mark.slow
def test_the_estimate_is_devinterps_within_the_joint_error(trained, prompts):
    """Each program uses its own noise, and minibatches of the same loader. The error of each is the spread between its chains.

    Both programs measure the excess over the checkpoint's loss on the whole sample. Minibatches are drawn with
    replacement. In passes through a shuffled sample, the LLC of devinterp would be higher by about 0.4 of 13: each
    of its chains makes passes of its own, while our chains share the minibatches of one pass (docs/gotchas.md).
    """
    loss, params = loss_of(trained)
    data, sizes = TensorDataset(prompts.xs, prompts.ys), {"num_chains": 8, "num_draws": 600, "num_burnin_steps": 300}
    loader = DataLoader(data, batch_size=BATCH_SIZE, sampler=RandomSampler(data, replacement=True))
    found = estimate_llc(loss, params, loader, **KERNEL, **sizes, seed=0, num_samples=NUM_PROMPTS)
    init_loss = float(loss(params, (prompts.xs, prompts.ys)))
    ours = found.llc_per_chain + KERNEL["nbeta"] * (found.init_loss - init_loss)
    theirs = devinterps(trained, loader, init_loss=init_loss, seed=0, **sizes)
    theirs = torch.tensor([theirs[f"llc-chain/{i}"] for i in range(sizes["num_chains"])], dtype=torch.float64)
    error = math.hypot(float(ours.std()), float(theirs.std())) / sizes["num_chains"] ** 0.5
    assert found.init_loss == pytest.approx(init_loss, abs=4 * found.init_loss_stderr)
    assert error < 0.1 * float(ours.mean())  # so that agreement means something
    assert abs(float(ours.mean() - theirs.mean())) < 3 * error


def devinterps(model, loader, **settings):
    """Return the summary of devinterp, which changes the global seed and warns about its settings."""
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    settings = {"optimizer_kwargs": dict(KERNEL), "verbose": False, **settings}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return estimate_learning_coeff_with_summary(model, loader, evaluate=evaluate, **settings)
