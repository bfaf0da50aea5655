"""devinterp 1.3.2 is an independent realisation: on a trained checkpoint, at the same settings, it finds the same LLC."""

import math
import warnings

import pytest
import torch
from tiny_runs import TINY, change
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from icl.build import build_model
from icl.population import stack
from icl.sampling import estimate_llc
from icl.sampling.prompt_loss import trivial_loss
from icl.step import adam_state, from_rows, make_step, shapes_of
from icl.tasks.prompts import sample_prompts

pytestmark = pytest.mark.slow
CONFIG = change(TINY, task={"num_tasks": 2})
KERNEL = {"lr": 2e-4, "nbeta": 100.0, "localization": 100.0}
SIZES = {"num_chains": 6, "num_draws": 600, "num_burnin_steps": 300}
NUM_PROMPTS, BATCH_SIZE = 1024, 64


@pytest.fixture(scope="module")
def trained():
    """The tiny run's model after four hundred steps, at less than half the loss of predicting zero."""
    model = build_model(CONFIG)
    params = stack([{name: p.detach() for name, p in model.named_parameters()}])
    state, shapes = adam_state(params), shapes_of(params)
    step, losses = make_step(CONFIG.model, CONFIG.optim, shapes), []
    for number in range(400):
        prompts = sample_prompts(CONFIG, stream="train", step=number, batch_size=BATCH_SIZE)
        info = step(state, prompts.xs[None], prompts.ys[None], torch.tensor([1e-2]))
        losses.append(float(info.losses))
    model.load_state_dict({name: row[0] for name, row in from_rows(state.rows, shapes).items()})
    assert sum(losses[-50:]) / 50 < trivial_loss(CONFIG) / 2
    return model


@pytest.fixture(scope="module")
def prompts():
    """The sample: both sides take their minibatches, and the checkpoint's loss, from it."""
    return sample_prompts(CONFIG, stream="llc", step=0, batch_size=NUM_PROMPTS)


def test_the_estimate_is_devinterps_within_the_joint_error(trained, prompts):
    """Both against the loss at the checkpoint on the whole sample; each with the spread between its chains as its error.

    Minibatches are drawn with replacement on both sides, so that both sample the same law of minibatches; passes through a
    shuffled sample, in which a minibatch is one that the chain has not lately seen, gave larger losses.
    """
    pytest.importorskip("devinterp", reason='needs devinterp 1.3.2: pip install -e ".[bench]"')
    params = {name: parameter.detach() for name, parameter in trained.named_parameters()}

    def loss(params, batch):
        return (functional_call(trained, params, batch) - batch[1]).square().mean()

    def batches(chain, draw):
        generator = torch.Generator().manual_seed(1000 * draw + chain)
        chosen = torch.randint(NUM_PROMPTS, (BATCH_SIZE,), generator=generator)
        return prompts.xs[chosen], prompts.ys[chosen]

    found = estimate_llc(loss, params, batches, **KERNEL, **SIZES, seed=0, num_samples=NUM_PROMPTS)
    init_loss = float(loss(params, (prompts.xs, prompts.ys)).detach())
    ours = found.llc_per_chain + KERNEL["nbeta"] * (found.init_loss - init_loss)
    theirs = devinterp_llcs(trained, prompts, init_loss)
    error = math.hypot(float(ours.std()), float(theirs.std())) / SIZES["num_chains"] ** 0.5
    assert found.init_loss == pytest.approx(init_loss, abs=4 * found.init_loss_stderr)
    assert error < 0.1 * float(ours.mean())  # so that agreement means something
    assert abs(float(ours.mean() - theirs.mean())) < 3 * error


def devinterp_llcs(model, prompts, init_loss):
    """Their estimate of each chain on the same sample; devinterp changes the global seed and warns of its settings."""
    from devinterp.slt.sampler import estimate_learning_coeff_with_summary

    def evaluate(model, batch):
        return (model(*batch) - batch[1]).square().mean()

    data = TensorDataset(prompts.xs, prompts.ys)
    loader = DataLoader(data, batch_size=BATCH_SIZE, sampler=RandomSampler(data, replacement=True))
    settings = {"optimizer_kwargs": dict(KERNEL), "init_loss": init_loss, "seed": 0, "verbose": False, **SIZES}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        found = estimate_learning_coeff_with_summary(model, loader, evaluate=evaluate, **settings)
    return torch.tensor([found[f"llc-chain/{i}"] for i in range(SIZES["num_chains"])], dtype=torch.float64)
