"""Output heads: densities against torch's distributions, samples against closed forms, and the fast form against the definition."""

import math

import pytest
import torch
from tiny_runs import TINY, change
from torch import distributions as dist

from icl.build import build_model
from icl.config import ModelConfig
from icl.config.validation import ConfigError
from icl.model import heads, stacked

OUTPUTS = ("gaussian", "mixture")


def config_of(output, num_components=3):
    return ModelConfig(output=output, **({"num_components": num_components} if output == "mixture" else {}))


def some_outputs(config, *leading, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    size = heads.output_size(config, token_size=4)
    return scale * torch.randn(*leading, size, generator=generator, dtype=torch.float64)


def oracle(config, outputs):
    """Return torch's own distribution of the target, from the formulas in the module."""
    if config.output == "gaussian":
        variance = torch.exp(10 * torch.tanh(outputs[..., 1] / 10))
        return dist.Normal(outputs[..., 0], variance.sqrt())
    j = config.num_components
    variances = torch.exp(10 * torch.tanh(outputs[..., j : 2 * j] / 10))
    parts = dist.Normal(outputs[..., :j], variances.sqrt())
    return dist.MixtureSameFamily(dist.Categorical(logits=outputs[..., 2 * j :]), parts)


@pytest.mark.parametrize("output", OUTPUTS)
def test_losses_and_predictions_are_those_of_torchs_distributions(output):
    config = config_of(output)
    outputs = some_outputs(config, 5, 7)
    ys = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = oracle(config, outputs)
    torch.testing.assert_close(heads.target_losses(config, outputs, ys), -expected.log_prob(ys))
    torch.testing.assert_close(heads.predictions(config, outputs), expected.mean)


def test_the_loss_of_a_point_prediction_is_its_squared_error():
    outputs, ys = torch.tensor([[2.0], [-1.0]]), torch.tensor([0.5, 1.0])
    assert heads.target_losses(config_of("scalar"), outputs, ys).tolist() == [2.25, 4.0]
    with pytest.raises(ValueError, match="has no predictive distribution"):
        heads.predictive(config_of("token"), outputs)


@pytest.mark.parametrize("output", OUTPUTS)
def test_extreme_outputs_have_finite_losses_and_gradients(output):
    """Without bounds, the variances would be exp(-1e4) and exp(1e4)."""
    config = config_of(output)
    for scale in (0.0, 1e4, -1e4):
        outputs = (scale * some_outputs(config, 6).sign()).float().requires_grad_()
        losses = heads.target_losses(config, outputs, torch.linspace(-3, 3, 6))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert outputs.grad.isfinite().all()
        log_variances = heads.predictive(config, outputs).log_variances
        assert log_variances.abs().max() <= heads.MAX_LOG_VARIANCE


@pytest.mark.parametrize("output", OUTPUTS)
def test_samples_have_the_mean_and_the_variance_of_their_distribution(output):
    config, count = config_of(output), 40_000
    outputs = some_outputs(config, 3, scale=1.0)
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    normals = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    drawn = heads.draw(heads.predictive(config, outputs.expand(count, 3, -1)), uniforms, normals)
    expected = oracle(config, outputs)
    for values, truth in ((drawn, expected.mean), ((drawn - expected.mean).square(), expected.variance)):
        stderr = values.std(0) / math.sqrt(count)
        assert ((values.mean(0) - truth).abs() < 4 * stderr).all()


def test_a_uniform_number_chooses_the_component():
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    means = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    each = heads.Predictive(weights.log(), means, torch.full((3,), -math.inf, dtype=torch.float64))
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 0.999], dtype=torch.float64)
    same = heads.Predictive(*(part.expand(6, 3) for part in each))
    assert heads.draw(same, uniforms, torch.ones(6, dtype=torch.float64)).tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("output", [*OUTPUTS, "token"])
def test_the_fast_form_has_the_losses_of_the_definition_and_their_gradients(output):
    config = change(TINY, model={"output": output})
    models = [build_model(change(config, seeds={"model": seed})).double() for seed in range(2)]
    params = stacked.stack([{n: p.detach() for n, p in model.named_parameters()} for model in models])
    params = {name: tensor.requires_grad_() for name, tensor in params.items()}
    generator = torch.Generator().manual_seed(0)
    xs, ys = (torch.randn(2, 5, *size, generator=generator, dtype=torch.float64) for size in ((4, 2), (4,)))
    losses = stacked.target_losses(config.model, params, xs, ys)
    losses.sum().backward()
    expected = torch.stack([model.losses(x, y) for model, x, y in zip(models, xs, ys, strict=True)])
    expected.sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(
        stacked.target_losses(config.model, params, xs[0], ys[0])[1], models[1].losses(xs[0], ys[0])
    )  # prompts that both members share
    for name, tensor in params.items():
        grads = torch.stack([dict(model.named_parameters())[name].grad for model in models])
        torch.testing.assert_close(tensor.grad, grads)
    if output != "token":
        assert models[0].predictive(xs[0], ys[0]).means.shape == (5, 4, 4 if output == "mixture" else 1)
        torch.testing.assert_close(models[0].predictive(xs[0], ys[0]).mean, models[0](xs[0], ys[0]))


@pytest.mark.parametrize(("output", "size"), [("scalar", 1), ("token", 3), ("gaussian", 2), ("mixture", 12)])
def test_sizes_of_the_outputs(output, size):
    model = build_model(change(TINY, model={"output": output}))
    assert model.unembedding.weight.shape[0] == size


def test_a_number_of_components_without_a_mixture_is_refused():
    with pytest.raises(ConfigError, match=r"`model.num_components` has no effect on the output `gaussian`"):
        ModelConfig(output="gaussian", num_components=8)
    with pytest.raises(ConfigError, match="num_components"):
        ModelConfig(output="mixture", num_components=0)
