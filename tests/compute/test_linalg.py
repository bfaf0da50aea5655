"""Lanczos, trace and spectrum of matrices with known eigenvalues."""

import pytest
import torch

from icl.compute.linalg import lanczos, ritz, trace

P = 300


def rotated(values, *, seed=0):
    """Return a symmetric matrix with given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return vectors @ torch.diag(values) @ vectors.mT


def products_of(*matrices):
    """Return the products of one member. Each matrix is the Hessian on one batch."""
    stacked = torch.stack(matrices)
    return lambda vectors: torch.einsum("jpq,nq->njp", stacked, vectors)


def normals(count, *, seed=1, size=P):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, size, generator=generator, dtype=torch.float64)


def spiked():
    """Return eigenvalues of a bulk with outliers at both ends, as of a Hessian."""
    bulk = torch.linspace(-1, 1, P - 5, dtype=torch.float64)
    return torch.cat((torch.tensor([-9.0, -4.0], dtype=torch.float64), bulk, torch.tensor([10.0, 20.0, 50.0])))


def test_extremes_of_a_spiked_spectrum():
    krylov = lanczos(products_of(rotated(spiked())), normals(1)[0], 40)
    identity = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(krylov.basis[0] @ krylov.basis[0].mT, identity, rtol=0, atol=1e-12)
    found = ritz(krylov)
    assert found.values[0, -3:].tolist() == pytest.approx([10, 20, 50], rel=1e-9)
    assert found.values[0, :2].tolist() == pytest.approx([-9, -4], rel=1e-9)
    assert (found.errors[0, [0, 1, -3, -2, -1]] < 1e-6).all()
    assert found.stderr.isnan().all()


def test_what_is_stated_to_have_converged_has():
    """Test both ends of the spectrum, after few and after more steps.

    If the stated error is below 1 % of the value, then so is the true error.
    """
    truth, verdicts = spiked(), []
    for num_steps in range(4, 24, 2):
        found = ritz(lanczos(products_of(rotated(truth)), normals(1)[0], num_steps))
        for index in (0, 1, -3, -2, -1):
            value, stated = found.values[0, index].item(), found.errors[0, index].item()
            is_stated = stated < 0.01 * abs(value)
            verdicts.append(is_stated)
            assert not is_stated or abs(value - truth[index].item()) < 0.01 * abs(truth[index].item())
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.9


def test_all_steps_give_the_whole_spectrum_and_the_exact_trace():
    values = torch.tensor([-2.0, 0.5, 1.0, 3.0, 7.0], dtype=torch.float64)
    products = products_of(rotated(values))
    krylov = lanczos(products, normals(1, size=5)[0], 99)
    assert ritz(krylov).values[0].tolist() == pytest.approx(values.tolist())
    found = trace(products, krylov, normals(2, size=5).sign())
    assert found.whole.value.item() == pytest.approx(9.5)
    assert found.probe_stderr.item() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiple_eigenvalues_are_all_found_once_the_space_is_exhausted(dtype):
    """For two distinct eigenvalues the Krylov space has two dimensions. Then new directions are used, without a division by zero."""
    values = torch.tensor([1.0] * 7 + [4.0] * 3, dtype=torch.float64)
    products = products_of(rotated(values).to(dtype))
    krylov = lanczos(products, normals(1, size=10)[0].to(dtype), 10)
    found = ritz(krylov)
    assert found.values[0].tolist() == pytest.approx(values.tolist(), rel=1e-5)
    assert found.weights[0].sum().item() == pytest.approx(1)


def test_a_matrix_of_zeros_has_zero_eigenvalues():
    products = products_of(torch.zeros(6, 6, dtype=torch.float64))
    krylov = lanczos(products, normals(1, size=6)[0], 4)
    assert ritz(krylov).values.tolist() == [[0.0] * 4]
    assert trace(products, krylov, normals(2, size=6).sign()).whole.value.item() == 0


def test_the_trace_is_unbiased_with_an_honest_error():
    matrix = rotated(spiked())
    products = products_of(matrix)
    krylov = lanczos(products, normals(1)[0], 12)
    probes = normals(400, seed=2).sign()
    found = [trace(products, krylov, probes[start : start + 8]) for start in range(0, 400, 8)]
    values = torch.stack([one.whole.value for one in found]).flatten()
    assert abs(values.mean() - matrix.trace()) < 4 * values.std() / len(values) ** 0.5
    stated = torch.stack([one.probe_stderr for one in found]).square().mean().sqrt()
    assert 0.8 < stated / values.std() < 1.25  # the sample deviation of 50 values is good to a tenth


def test_the_krylov_space_makes_the_trace_better_than_hutchinsons():
    matrix = rotated(spiked())
    products = products_of(matrix)
    probes = normals(16, seed=3).sign()
    plain = torch.einsum("rnp,pq,rnq->r", probes, matrix, probes)
    ours = trace(products, lanczos(products, normals(1)[0], 12), probes)
    assert ours.probe_stderr.item() < 0.5 * (plain.std() / 4).item()


def test_quadrature_integrates_polynomials_of_the_start_exactly():
    """With m nodes, sum w theta^k = v' A^k v / v' v for all powers k up to 2m - 1 (Golub and Meurant)."""
    matrix, start = rotated(spiked()), normals(1)[0]
    found = ritz(lanczos(products_of(matrix), start, 6))
    image = start[0] / start[0].norm()
    for power in range(12):
        moment = (found.weights[0] * found.values[0] ** power).sum()
        truth = image @ torch.linalg.matrix_power(matrix, power) @ image
        torch.testing.assert_close(moment, truth, rtol=1e-9, atol=1e-9)


def test_shares_of_the_spectrum_are_within_their_error():
    """A third of the eigenvalues are 2, and the others are in [-1, 1]."""
    values = torch.cat((torch.linspace(-1, 1, 200, dtype=torch.float64), torch.full((100,), 2.0, dtype=torch.float64)))
    shares = []
    for seed in range(20):
        found = ritz(lanczos(products_of(rotated(values)), normals(1, seed=seed)[0], 25))
        shares.append(found.weights[found.values > 1.5].sum().item())
    error = (2 * (1 / 3) * (2 / 3) / P) ** 0.5
    assert abs(sum(shares) / 20 - 1 / 3) < 4 * error / 20**0.5
    assert torch.tensor(shares).std().item() == pytest.approx(
        error, rel=0.5
    )  # 3 standard errors of 20 values' deviation


def test_batches_give_the_error_of_another_draw():
    """For A_j = A + noise_j, the errors of eigenvalue and trace are those of the mean of J such matrices."""
    generator = torch.Generator().manual_seed(4)
    base = rotated(spiked())
    noise = torch.randn(2000, P, generator=generator, dtype=torch.float64) * 3
    batches = [base + torch.diag(one) for one in noise[:40]]
    products = products_of(*batches)
    krylov = lanczos(products, normals(1)[0], 40)
    found = ritz(krylov)
    vector = torch.linalg.eigh(torch.stack(batches).mean(0)).eigenvectors[:, -1]
    expected = 3 * vector.square().norm() / 40**0.5  # to first order v' diag(noise) v
    assert found.stderr[0, -1].item() == pytest.approx(expected.item(), rel=0.5)
    traces = trace(products, krylov, normals(64, seed=5).sign())
    of_batches = 3 * P**0.5 / 40**0.5
    total = (traces.probe_stderr.item() ** 2 + of_batches**2) ** 0.5
    assert traces.whole.stderr.item() == pytest.approx(total, rel=0.5)


def test_members_have_matrices_of_their_own():
    first, second = rotated(spiked()), rotated(-spiked(), seed=7)
    together = torch.stack((first, second))
    starts = normals(2).squeeze(1)
    both = ritz(lanczos(lambda v: torch.einsum("npq,nq->np", together, v).unsqueeze(1), starts, 20))
    for member, matrix in enumerate((first, second)):
        alone = ritz(lanczos(products_of(matrix), starts[member : member + 1], 20))
        torch.testing.assert_close(both.values[member], alone.values[0])
