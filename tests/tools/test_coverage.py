"""Losses and cells of the coverage study: gradients in closed form against autograd, minibatches without bias, and runs that differ."""

import pytest
import torch

from icl.model.flat import make_layout
from icl.model.stacked import stack
from icl.sampling.batches import stack_batches
from tools import coverage
from tools.coverage import Cell, measure


@pytest.mark.parametrize(
    ("loss", "gradient", "size"),
    [
        (coverage._quadratic, coverage._quadratic_gradient, 6),
        (coverage._product, coverage._product_gradient, 2),
    ],
    ids=["quadratic", "product"],
)
def test_gradients_in_closed_form_equal_autograd(loss, gradient, size):
    batches = [torch.randn(3, 2, 6), torch.randn(3, 2, 6)] if size == 6 else [None, None]
    members = [{"w": torch.randn(size), "run": torch.eye(3)[number]} for number in (0, 2)]
    layout = make_layout(members[0], {"w": torch.ones(size, dtype=torch.bool)})
    stacked = stack(members)
    grads, losses = gradient(
        layout, layout.to_rows(stacked), layout.fixed(stacked), stack_batches(batches, torch.device("cpu"))
    )
    for member, batch, grad, value in zip(members, batches, grads, losses, strict=True):
        w = member["w"].requires_grad_()
        expected = loss(member | {"w": w}, batch)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(grad[:size], torch.autograd.grad(expected, w)[0])
        assert not grad[size:].any()  # padding


@pytest.mark.parametrize("loss", ["pool", "list"])
def test_noise_of_a_fixed_set_of_minibatches_has_mean_zero_in_every_run(loss):
    batches = coverage._minibatches(loss, 3, seed=5)
    minibatches = batches if loss == "list" else [batches.pool.get(number) for number in range(batches.pool.size)]
    noise = torch.stack(list(minibatches))  # minibatches, runs, 2, 6
    torch.testing.assert_close(noise.mean(0), torch.zeros(3, 2, 6), atol=1e-7, rtol=0.0)
    assert noise.std(0) == pytest.approx(torch.full((3, 2, 6), coverage.NOISE), rel=0.5)
    assert not torch.equal(noise[:, 0], noise[:, 1])


@pytest.mark.parametrize("loss", coverage.LOSSES)
def test_runs_of_a_cell_differ_and_estimate_its_truth(loss, monkeypatch):
    monkeypatch.setattr(coverage, "RUNS_AT_ONCE", 3)
    llcs = [result.llc for result in coverage._results(Cell(loss, "baoab", 4, 300, None, 5))]
    assert len(set(llcs)) == 5
    assert sum(llcs) / 5 == pytest.approx(coverage._truth(loss), rel=0.25)  # the standard error is a tenth of this


def test_a_row_has_the_shares_of_covered_and_ok_runs():
    cell = Cell("quadratic", "baoab", 4, 300, None, 5)
    results, truth, row = coverage._results(cell), coverage._truth("quadratic"), measure(cell)
    is_ok = [result.verdict == "ok" for result in results]
    covers = [result.interval[0] <= truth <= result.interval[1] for result in results]
    assert row["num_runs"] == 5
    assert row["share_ok"] == pytest.approx(sum(is_ok) / 5)
    assert row["coverage"] == pytest.approx(sum(covers) / 5)
    if any(is_ok):
        assert row["coverage_ok"] == pytest.approx(
            sum(map(all, zip(is_ok, covers, strict=True))) / sum(is_ok), abs=1e-4
        )
