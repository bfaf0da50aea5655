"""Known learning coefficients: formulas compared with each other, with published tables, with limits and with numerical integration."""

import itertools
import math

import pytest
import scipy.integrate
import torch

from icl.sampling import known


@pytest.mark.parametrize(
    ("shape", "rank", "value"),
    [
        ((5, 3, 5), 0, 6.5),
        ((5, 4, 5), 0, 8),
        ((4, 3, 8), 0, 6),
        ((8, 3, 4), 0, 6),
        ((3, 8, 4), 0, 6),
        ((10, 10, 10), 5, 47),
    ],
)
def test_reduced_rank_values(shape, rank, value):
    assert known.reduced_rank(*shape, rank) == value


def test_deep_linear_networks_of_two_layers_are_reduced_rank_regressions():
    """Two formulas from different theorems agree on all shapes up to seven and all ranks."""
    cases = 0
    for m, h, n in itertools.product(range(1, 8), repeat=3):
        for rank in range(min(m, h, n) + 1):
            assert known.deep_linear([m, h, n], rank).value == pytest.approx(known.reduced_rank(m, h, n, rank))
            cases += 1
    assert cases == 1127


def test_deep_linear_values():
    assert known.deep_linear([10] * 4, 5) == (46, 3)
    for num_layers in (2, 3, 6):
        assert known.deep_linear([1] * (num_layers + 1), 0) == (0.5, num_layers)  # a normal crossing


def test_full_rank_is_regular_in_the_map():
    """If the map has full rank, lambda is half the number of entries of the product."""
    assert known.deep_linear([4, 4, 4], 4).value == 8
    assert known.reduced_rank(4, 4, 4, 4) == 8


def test_normal_crossings():
    assert known.normal_crossing([0, 1]) == (0.5, 1)
    assert known.normal_crossing([1, 1]) == (0.5, 2)
    assert known.normal_crossing([1, 2]) == (0.25, 1)
    assert known.normal_crossing([1, 3]).value == pytest.approx(1 / 6)
    assert known.normal_crossing([1, 2], [0, 3]) == (0.5, 1)
    with pytest.raises(ValueError, match="positive power"):
        known.normal_crossing([0, 0])


def test_separable_and_radial_powers():
    assert known.separable([1, 2, 0]) == 0.75


def test_quadratics_at_finite_nbeta():
    """The four numbers of PAPERS 7.2, and the limits of zero step size and of large nbeta."""
    h = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    each = [known.quadratic_llc(h[i : i + 1], nbeta=66.7, localization=6.67, lr=3e-3) for i in range(4)]
    assert each == pytest.approx([0.0457, 0.2525, 0.4810, 1.0006], abs=1e-4)
    assert known.quadratic_llc(h, nbeta=1e9, localization=1.0) == pytest.approx(known.regular(4), rel=1e-6)
    assert known.quadratic_llc(h, nbeta=66.7, localization=6.67, lr=6e-3) == math.inf


@pytest.mark.parametrize(
    ("loss", "num_params", "value"),
    [
        (lambda w: (w[:, 0] * w[:, 1]) ** 2, 2, 0.398),
        (lambda w: w.square().sum(1) / 2, 1, 0.5 * 500 / 500.5),
        (lambda w: w.square().sum(1) / 2, 2, 500 / 500.5),
        (lambda w: w.square().sum(1) / 2, 3, 1.5 * 500 / 500.5),
    ],
)
def test_quadrature_meets_known_values(loss, num_params, value):
    """The target of (ab)^2 at nbeta = 500 and localization = 0.5 is 0.398; quadratics are exact."""
    assert known.localized_llc(loss, num_params, nbeta=500.0, localization=0.5) == pytest.approx(value, rel=5e-4)


def test_quadrature_meets_adaptive_quadrature():
    def moment(power):
        return scipy.integrate.quad(lambda w: w ** (4 * power) * math.exp(-500 * w**4 - w * w / 4), -3, 3, points=(0,))[
            0
        ]

    ours = known.localized_llc(lambda w: w[:, 0] ** 4, 1, nbeta=500.0, localization=0.5)
    assert ours == pytest.approx(500 * moment(1) / moment(0), rel=1e-6)


def test_singular_values_approach_the_asymptotic_one():
    """The target of w^4 approaches the limit from below, and faster than the normal crossing, which has multiplicity 2."""
    quartic = [known.localized_llc(lambda w: w[:, 0] ** 4, 1, nbeta=n, localization=0.5) for n in (10.0, 1e3, 1e5)]
    crossing = [known.localized_llc(lambda w: w.prod(1) ** 2, 2, nbeta=n, localization=0.5) for n in (10.0, 1e3, 1e5)]
    assert quartic == sorted(quartic)
    assert quartic[-1] == pytest.approx(0.25, abs=1e-3)
    assert crossing == sorted(crossing)
    assert 0.4 < crossing[-1] < 0.5


def test_localised_reduced_rank_regression_with_one_unit_each_is_the_normal_crossing():
    ours = known.localized_reduced_rank_llc(1, 1, 1, nbeta=500.0, localization=0.5)
    quadrature = known.localized_llc(lambda w: w.prod(1) ** 2 / 2, 2, nbeta=500.0, localization=0.5)
    assert ours == pytest.approx(quadrature, rel=1e-4)


def test_localised_reduced_rank_regression_against_independent_draws_of_the_prior():
    """Compare with importance sampling at small nbeta: 400,000 draws of the prior, agreement within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400_000, 2, 3, generator=generator)
    b = torch.randn(400_000, 4, 2, generator=generator)
    values = (b @ a).square().sum((1, 2)) / 2
    weights = (-0.5 * values).exp()
    mean = (weights * values).sum() / weights.sum()
    stderr = (weights * (values - mean)).std() / weights.mean() / 400_000**0.5
    ours = known.localized_reduced_rank_llc(3, 2, 4, nbeta=0.5, localization=1.0)
    assert ours == pytest.approx(0.5 * float(mean), abs=4 * 0.5 * float(stderr))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rank"):
        known.reduced_rank(3, 2, 3, 3)
    with pytest.raises(ValueError, match="rank"):
        known.deep_linear([3, 2, 3], 3)
    with pytest.raises(ValueError, match="three dimensions"):
        known.localized_llc(lambda w: w.sum(1), 4, nbeta=1.0, localization=1.0)
