"""Metrics compared with numbers computed by hand and with scipy, and accumulated over batches and processes."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from icl import metrics
from icl.metrics import (
    PositionLoss,
    icl_score,
    overall_mean,
    position_mean,
    ratio_of_means,
    squared_error,
)

SIZES = {"num_prompts": st.integers(2, 20), "num_examples": st.integers(1, 6), "seed": st.integers(0, 1000)}


def make_values(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_estimate(found, value, stderr, **tolerances):
    torch.testing.assert_close(found.value, torch.as_tensor(value, dtype=found.value.dtype), **tolerances)
    torch.testing.assert_close(found.stderr, torch.as_tensor(stderr, dtype=found.stderr.dtype), **tolerances)


# By hand: errors 1, 3 at the first position and 4, 8 at the second

ERRORS = torch.tensor([[1.0, 4.0], [3.0, 8.0]])


def test_position_mean_by_hand():
    """Two numbers a and b have mean (a + b) / 2 and standard error |a - b| / 2."""
    assert_estimate(position_mean(ERRORS), [2.0, 6.0], [1.0, 2.0])


def test_overall_mean_by_hand():
    """The prompts' own means are 2.5 and 5.5."""
    assert_estimate(overall_mean(ERRORS), 4.0, 1.5)


def test_icl_score_by_hand():
    """The differences of two prompts are 3 and 5. If the loss rises with more examples, this is bad, and the score is positive."""
    assert_estimate(icl_score(ERRORS, 1, 2), 4.0, 1.0)
    assert_estimate(icl_score(ERRORS, 2, 1), -4.0, 1.0)


def test_squared_error_by_hand():
    found = squared_error(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
    assert found.tolist() == [[4.0, 9.0]]


def test_gap_by_hand():
    """The squares are 1 and 9 at one position, 0 and 4 at the other. They are not divided by D."""
    model, other = torch.tensor([[1.0, 5.0], [4.0, 2.0]]), torch.tensor([[2.0, 5.0], [1.0, 4.0]])
    assert_estimate(position_mean(squared_error(model, other)), [5.0, 2.0], [4.0, 2.0])


# Oracles


@given(**SIZES)
def test_estimates_match_scipy(num_prompts, num_examples, seed):
    values = make_values(num_prompts, num_examples, seed=seed)
    assert_estimate(position_mean(values), values.numpy().mean(0), stats.sem(values.numpy(), axis=0))
    prompts = values.numpy().mean(1)
    assert_estimate(overall_mean(values), prompts.mean(), stats.sem(prompts))


@given(**SIZES, data=st.data())
def test_icl_score_is_the_difference_of_the_losses(num_prompts, num_examples, seed, data):
    values = make_values(num_prompts, num_examples, seed=seed)
    first, second = (data.draw(st.integers(1, num_examples)) for _ in range(2))
    paired = values[:, second - 1] - values[:, first - 1]
    assert_estimate(icl_score(values, first, second), paired.mean(), stats.sem(paired.numpy()))


@given(**SIZES, num_members=st.integers(1, 4))
def test_population_is_its_members_one_by_one(num_prompts, num_examples, seed, num_members):
    values = make_values(num_members, num_prompts, num_examples, seed=seed)
    for function in (position_mean, overall_mean, lambda errors: icl_score(errors, 1, num_examples)):
        together, alone = function(values), [function(member) for member in values]
        assert_estimate(together, torch.stack([e.value for e in alone]), torch.stack([e.stderr for e in alone]))


def test_members_may_share_their_targets():
    predictions, targets = make_values(3, 4, 5), make_values(4, 5, seed=1)
    expected = torch.stack([(member - targets).square() for member in predictions])
    assert torch.equal(squared_error(predictions, targets), expected)


def test_standard_error_is_the_spread_of_repeated_evaluations():
    """The spread of 2,000 means over 50 prompts equals the root of their mean squared standard error, to 5 %."""
    estimate = position_mean(make_values(2000, 50, 1).square())
    assert abs(estimate.value.std() / estimate.stderr.square().mean().sqrt() - 1) < 0.05


def test_standard_error_over_positions_counts_that_they_share_a_prompt():
    """Equal values at all 9 positions of a prompt give no more information than a single value."""
    values = make_values(100, 1)
    repeated = overall_mean(values.expand(100, 9))
    assert_estimate(repeated, values.mean(), position_mean(values).stderr[0])


def test_large_offset_leaves_the_standard_error():
    values = make_values(1000, 2, dtype=torch.float32)
    exact = position_mean(values.double()).stderr.float()
    torch.testing.assert_close(position_mean(values + 1000).stderr, exact, rtol=1e-3, atol=0)


def test_single_prompt_has_a_mean_and_no_standard_error():
    estimate = position_mean(torch.tensor([[1.0, 2.0]]))
    assert estimate.value.tolist() == [1.0, 2.0]
    assert estimate.stderr.isnan().all()


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 3), (-1, 2), (3, 1)])
def test_positions_that_do_not_exist_are_refused(first, second):
    with pytest.raises(ValueError, match=r"must be (a whole number of at least 1, got (0|-1)|at most 2, got 3)"):
        icl_score(ERRORS, first, second)


# Streaming


def streamed(predictions, targets, sizes, num_examples):
    loss = PositionLoss(max_examples=num_examples)
    for batch in zip(predictions.split(sizes), targets.split(sizes), strict=True):
        loss.update(*batch)
    return loss


def assert_summary(summary, predictions, targets, **tolerances):
    errors = squared_error(predictions, targets).double()
    for found, expected in ((summary.positions, position_mean(errors)), (summary.mean, overall_mean(errors))):
        assert_estimate(found, expected.value, expected.stderr, **tolerances)


@given(sizes=st.lists(st.integers(1, 20), min_size=2, max_size=4), num_examples=st.integers(2, 5))
def test_loss_over_uneven_batches_is_that_of_all_prompts(sizes, num_examples):
    predictions, targets = make_values(sum(sizes), num_examples), make_values(sum(sizes), num_examples, seed=1)
    assert_summary(
        streamed(predictions, targets, sizes, num_examples).compute(), predictions, targets, rtol=1e-5, atol=1e-6
    )


def test_loss_over_very_many_batches_does_not_drift():
    """A running sum in float32 would drift over these 2,000 batches of large, nearly equal errors."""
    predictions, targets = 30 + make_values(20_000, 2) / 100, torch.zeros(20_000, 2, dtype=torch.float64)
    assert_summary(streamed(predictions, targets, 10, 2).compute(), predictions, targets, rtol=1e-4, atol=0)


def test_loss_may_be_taken_along_the_way():
    predictions, targets = make_values(10, 3), make_values(10, 3, seed=1)
    loss = streamed(predictions[:6], targets[:6], 6, 3)
    assert_summary(loss.compute(), predictions[:6], targets[:6], rtol=1e-5, atol=1e-6)
    assert_summary(loss(predictions[6:], targets[6:]), predictions[6:], targets[6:], rtol=1e-5, atol=1e-6)
    assert_summary(loss.compute(), predictions, targets, rtol=1e-5, atol=1e-6)


def test_reset_forgets():
    predictions, targets = make_values(6, 3), make_values(6, 3, seed=1)
    loss = streamed(make_values(4, 3, seed=2), make_values(4, 3, seed=3), 4, 3)
    loss.reset()
    loss.update(predictions, targets)
    assert_summary(loss.compute(), predictions, targets, rtol=1e-5, atol=1e-6)


def test_losses_of_two_halves_merge():
    predictions, targets = make_values(10, 3), make_values(10, 3, seed=1)
    first, second = streamed(predictions[:3], targets[:3], 3, 3), streamed(predictions[3:], targets[3:], 7, 3)
    first.merge_state(second)
    assert_summary(first.compute(), predictions, targets, rtol=1e-5, atol=1e-6)


def test_merging_losses_of_nothing_leaves_them_usable():
    """This occurs if some processes of a small evaluation have no prompts yet."""
    predictions, targets = make_values(6, 3), make_values(6, 3, seed=1)
    first, second = PositionLoss(max_examples=3), PositionLoss(max_examples=3)
    first.merge_state(second)
    first.update(predictions, targets)
    assert_summary(first.compute(), predictions, targets, rtol=1e-5, atol=1e-6)


def test_loss_survives_pickling():
    loss = streamed(make_values(4, 3), make_values(4, 3, seed=1), 4, 3)
    again = pickle.loads(pickle.dumps(loss))
    assert type(again) is PositionLoss
    assert torch.equal(again.compute().positions.value, loss.compute().positions.value)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from icl.metrics import PositionLoss
rank, path, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
errors = torch.arange(12.0).sqrt().reshape(6, 2)
loss = PositionLoss(max_examples=2)
loss.update(errors[:2] if rank == 0 else errors[2:], torch.zeros(2 if rank == 0 else 4, 2))
(positions, mean) = loss.compute()
torch.save(torch.stack((*positions, *(m.expand(2) for m in mean))), f"{out}-{rank}")
"""


@pytest.mark.slow
def test_loss_over_two_processes_is_that_of_all_prompts(tmp_path):
    """The processes have different numbers of prompts. Both get the loss over all prompts."""
    arguments = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "meet"), str(tmp_path / "out")]) for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    errors = torch.arange(12.0).reshape(6, 2)
    (value, stderr), mean = position_mean(errors), overall_mean(errors)
    expected = torch.stack((value, stderr, *(one.expand(2) for one in mean)))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"out-{rank}"), expected)


@pytest.mark.gpu
def test_loss_accumulates_on_cuda():
    predictions, targets = make_values(10, 3, dtype=torch.float32), make_values(10, 3, seed=1, dtype=torch.float32)
    loss = PositionLoss(max_examples=3).cuda()
    loss.update(predictions.cuda(), targets.cuda())
    assert_summary(loss.cpu().compute(), predictions, targets, rtol=1e-5, atol=1e-6)


def test_a_ratio_of_means_is_off_by_its_standard_error():
    """The true ratio is 3. Over 2,000 draws, the z scores have deviation 1 and mean 0, up to a bias of order 1 / B."""
    below = 1 + 0.3 * make_values(2000, 100, seed=1)
    above = 3 * below + 0.5 * make_values(2000, 100, seed=2)
    found = ratio_of_means(above, below)
    scores = (found.value - 3) / found.stderr
    assert abs(scores.mean()) < 4 / 2000**0.5
    assert abs(scores.std() - 1) < 4 / 4000**0.5
    torch.testing.assert_close(found.value, above.mean(1) / below.mean(1))


@pytest.mark.slow
def test_importing_metrics_leaves_torchmetrics_alone():
    code = "import sys, icl.metrics; assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_unknown_name_of_the_module_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PositionGain'"):
        metrics.PositionGain  # noqa: B018


def test_types_and_shapes_are_checked_where_the_option_asks_for_it(request):
    """Without this test nobody would notice that CI's checks of types and shapes no longer take place."""
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("needs --jaxtyping-packages=icl,beartype.beartype, as in .ci/run")
    values = make_values(2, 3, 4)
    for wrong in (make_values(5, 4), values.numpy(), values.long()):
        with pytest.raises(TypeCheckError):
            squared_error(values, wrong)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float16, 70_000), (torch.bfloat16, 1001)])
def test_moments_of_predictions_with_16_bits_are_those_in_float32(dtype, count):
    """In float16, the count 70,000 is infinite; in bfloat16, 1,001 is rounded to 1,000."""
    values = make_values(count, 2, dtype=dtype)
    for mean in (position_mean, overall_mean):
        found, expected = mean(values), mean(values.float())
        assert found.value.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(squared_error(300 * values, values), squared_error((300 * values).float(), values.float()))


def test_the_running_loss_counts_more_prompts_than_float32_can_count():
    loss = PositionLoss(max_examples=1)
    loss.moments[0] = 2.0**24
    loss.update(torch.zeros(1, 1), torch.zeros(1, 1))
    assert loss.moments[0].tolist() == [2**24 + 1] * 2
