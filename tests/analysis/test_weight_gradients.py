"""Gradient statistics, on gradients of known mean and covariance, and on models in comparison with plain loops."""

import numpy as np
import pytest
import torch
from tiny_runs import TINY, change

from icl.analysis.gradients import principal_components
from icl.analysis.gradients import weights as wg
from icl.build import build_model
from icl.model.stacked import apply, stack
from icl.tasks.prompts import sample_prompts

B, P = 8, 50
"""Batch size and number of weights of the made-up gradients."""


def made_up(num_batches, *, num_members, seed, mean=0.5, shared=None):
    """Return batch gradients from N(mean, Sigma / B) with Sigma = diag(1, ..., P). `shared` noise is the same for two sets."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_members, num_batches, P, generator=generator, dtype=torch.float64)
    noise = noise if shared is None else shared
    deviations = torch.arange(1, P + 1).double().sqrt()
    return mean + noise * deviations / B**0.5, noise


def within(estimate, truth):
    """Return whether the mean over independent members is within four of its standard errors of the truth."""
    values = estimate.value
    return (values.mean() - truth).abs() < 4 * values.std() / len(values) ** 0.5


def test_squared_norm_and_noise_trace_are_unbiased():
    gradients, _ = made_up(16, num_members=400, seed=0)
    gram = gradients @ gradients.mT
    squared, trace = wg.squared_norm(wg.inner(gram)), wg.noise_trace(gram, B)
    assert within(squared, P * 0.25)
    assert within(trace, P * (P + 1) / 2)
    for estimate in (squared, trace):  # the jackknife overstates the spread of the estimates, by at most sqrt(2)
        ratio = (estimate.stderr.square().mean().sqrt() / estimate.value.std()).item()
        assert 0.9 < ratio < 1.1 * 2**0.5


def test_the_noise_scale_has_its_known_value():
    gradients, _ = made_up(400, num_members=20, seed=1, mean=1.0)
    scale = wg.noise_scale(gradients @ gradients.mT, B)
    truth = P * (P + 1) / 2 / P
    assert ((scale.value - truth).abs() < 4 * scale.stderr).all()
    assert (scale.stderr < 0.1 * truth).all()


def test_two_batch_sizes_give_the_same_estimates():
    """|G|^2 and tr Sigma follow from batches of size b and from their union (McCandlish et al. 2018, appendix A.1)."""
    gradients, _ = made_up(10, num_members=1, seed=2)
    small, big = gradients[0].square().sum(-1).mean(), gradients[0].mean(0).square().sum()
    squared = (10 * B * big - B * small) / (10 * B - B)
    trace = (small - big) / (1 / B - 1 / (10 * B))
    gram = gradients @ gradients.mT
    assert wg.squared_norm(wg.inner(gram)).value.item() == pytest.approx(squared.item())
    assert wg.noise_trace(gram, B).value.item() == pytest.approx(trace.item())


def test_the_mean_gradient_is_that_of_finite_differences_and_knows_its_noise():
    config = change(TINY, model={"num_layers": 2})
    models = [build_model(change(config, seeds={"model": seed})).double() for seed in (0, 1)]
    params = stack([dict(model.named_parameters()) for model in models])
    params = {name: tensor.detach() for name, tensor in params.items()}
    prompts = sample_prompts(config, stream="x", step=0, batch_size=24)
    prompts = prompts._replace(xs=prompts.xs.double(), ys=prompts.ys.double())
    found, noise = wg.mean_gradient(models[0].config, params, prompts, 6)

    def losses(moved):
        return (apply(models[0].config, moved, prompts.xs, prompts.ys) - prompts.ys).square().mean((1, 2))

    generator = torch.Generator().manual_seed(0)
    way = {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in params.items()}
    ahead, behind = ({name: tensor + sign * 1e-5 * way[name] for name, tensor in params.items()} for sign in (1, -1))
    along = (torch.cat([part.flatten(1) for part in way.values()], 1) * found).sum(1)
    torch.testing.assert_close(along, (losses(ahead) - losses(behind)) / 2e-5, rtol=1e-6, atol=1e-9)
    # closed form: of the bias of the prediction itself it is twice the mean residual
    place = sum(tensor[0].numel() for tensor in list(params.values())[: list(params).index("unembedding.bias")])
    residuals = apply(models[0].config, params, prompts.xs, prompts.ys) - prompts.ys
    torch.testing.assert_close(found[:, place], 2 * residuals.mean((1, 2)))
    gram = wg.grams(*[wg.batch_gradients(models[0].config, params, prompts, 6)] * 2)["all"]
    torch.testing.assert_close(noise, wg.noise_trace(gram, 4).value / 24)


def test_alignment_is_unbiased_by_shared_noise():
    """Two sets of gradients on the same prompts have orthogonal means, but the same noise."""
    first, noise = made_up(8, num_members=300, seed=3, mean=torch.tensor([1.0, 1.0]).repeat(P // 2))
    second, _ = made_up(8, num_members=300, seed=3, mean=torch.tensor([1.0, -1.0]).repeat(P // 2), shared=noise)
    cosine = wg.alignment(first @ second.mT, first @ first.mT, second @ second.mT)
    known = cosine.value.isfinite()
    assert known.float().mean() > 0.95
    assert cosine.value[known].median().abs() < 0.05  # its own error is about 0.01
    naive = torch.nn.functional.cosine_similarity(first.mean(1), second.mean(1))
    assert naive.mean() > 0.2


def test_a_gradient_is_aligned_with_itself_and_opposed_to_its_negative():
    gradients, _ = made_up(8, num_members=3, seed=4, mean=10.0)
    gram = gradients @ gradients.mT
    assert torch.allclose(wg.alignment(gram, gram, gram).value, torch.ones(3).double())
    assert torch.allclose(wg.alignment(-gram, gram, gram).value, -torch.ones(3).double())


def test_task_alignment_of_known_gradients():
    """Three tasks have the means a + e_i, with |a|^2 = 4 and a orthogonal to all e_i. So the cosine of each pair is 4 / 5."""
    generator = torch.Generator().manual_seed(5)
    means = torch.eye(8, dtype=torch.float64)[:3] + 2 * torch.eye(8, dtype=torch.float64)[7]
    gradients = means.unsqueeze(1) + 0.3 * torch.randn(3, 200, 8, generator=generator, dtype=torch.float64)
    between = torch.einsum("qip,rjp->qrij", gradients, gradients).unsqueeze(0)
    found = wg.task_alignment(between)
    assert abs(found.value.item() - 0.8) < 4 * found.stderr.item()
    assert found.stderr.item() < 0.02


def test_a_drowned_gradient_has_no_noise_scale():
    gram = torch.eye(4, dtype=torch.float64).unsqueeze(0) - 0.1
    assert wg.noise_scale(gram, 1).value.isnan().all()
    assert wg.norm(wg.inner(gram)).value.item() == 0


def test_a_populations_gradients_are_those_of_its_models():
    models = [build_model(change(TINY, seeds={"model": seed})) for seed in range(2)]
    prompts = sample_prompts(TINY, stream="g", step=0, batch_size=12)
    params = stack([{n: p.detach() for n, p in model.named_parameters()} for model in models])
    found = wg.batch_gradients(models[0].config, params, prompts, 3)
    for number, model in enumerate(models):
        for batch in range(3):
            rows = slice(4 * batch, 4 * batch + 4)
            model.zero_grad()
            (model(prompts.xs[rows], prompts.ys[rows]) - prompts.ys[rows]).square().mean().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(found[name][number, batch], parameter.grad.flatten(), rtol=1e-4, atol=1e-5)


def test_groups_sum_to_all():
    model = build_model(TINY)
    prompts = sample_prompts(TINY, stream="g", step=0, batch_size=12)
    params = stack([{n: p.detach() for n, p in model.named_parameters()}])
    gradients = wg.batch_gradients(model.config, params, prompts, 3)
    grams = wg.grams(gradients, gradients)
    families = ("embeddings", "attention", "mlp", "norms", "unembedding")
    torch.testing.assert_close(sum(grams[name] for name in families), grams["all"])
    assert {"blocks.0.attention", "blocks.0.mlp_norm", "token_embedding"} <= set(grams)
    assert wg.groups("blocks.1.attention_norm.weight") == ("all", "norms", "blocks.1.attention_norm")
    assert wg.groups("unembedding.bias") == ("all", "unembedding")


def test_components_do_not_depend_on_the_unit_of_the_gradients():
    """Gradients below 1e-8 counted as equal, so they had no components."""
    vectors = np.random.default_rng(0).normal(size=(5, 7))
    scores, shares = principal_components(1e-10 * vectors)
    expected_scores, expected_shares = principal_components(vectors)
    assert shares == pytest.approx(expected_shares)
    assert 1e10 * np.abs(scores) == pytest.approx(np.abs(expected_scores))
    assert principal_components(np.full((5, 7), 1e-10))[1].size == 0
