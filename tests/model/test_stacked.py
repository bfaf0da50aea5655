"""The stacked model computes what the definition in `icl.model.transformer` computes, gradients included."""

import pytest
import torch

from icl.config import ModelConfig
from icl.model import stacked
from icl.model.transformer import Transformer, initialise

D, K, B, N = 3, 4, 5, 3
OPTIONS = {
    "pre": {},
    "post": {"layer_norm": "post"},
    "post, double": {"layer_norm": "post", "double_residual": True},
    "none, double": {"layer_norm": "none", "double_residual": True},
    "gpt2": {"activation": "gelu_tanh", "attention_bias": True, "output": "scalar", "init": "gpt2"},
    "no W_O": {"attention_output": False, "activation": "gelu", "num_layers": 1},
    "biases": {"embedding_bias": True, "attention_bias": True, "mlp_bias": False, "unembedding_bias": False},
}


def make_config(**options):
    return ModelConfig(**{"num_heads": 2, "embed_size": 8, "mlp_size": 6, **options})


def make_members(num=N, dtype=torch.float64, **options):
    config = make_config(**options)
    members = [Transformer(config, task_size=D, max_examples=K).to(dtype) for _ in range(num)]
    for seed, member in enumerate(members):
        generator = torch.Generator().manual_seed(seed)
        initialise(member, config, generator)
        with torch.no_grad():  # so that biases and norms take part
            for parameter in member.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return members


def make_prompts(*leading, dtype=torch.float64, num_examples=K):
    generator = torch.Generator().manual_seed(7)
    xs = torch.randn(*leading, B, num_examples, D, generator=generator, dtype=dtype)
    return xs, torch.randn(*leading, B, num_examples, generator=generator, dtype=dtype)


def stack(members):
    return stacked.stack([dict(member.named_parameters()) for member in members])


def leaves(members):
    return {name: tensor.detach().requires_grad_() for name, tensor in stack(members).items()}


def largest_relative_difference(ours, expected):
    return float(((ours - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num", [1, N])
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "as compiled"])
def test_predictions_and_gradients_are_the_definitions(num, options, dtype, tolerance, compiling, monkeypatch):
    """Differences are relative to the largest prediction and to the largest gradient of each parameter."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    members, params = make_members(num, dtype, **options), leaves(make_members(num, dtype, **options))
    xs, ys = make_prompts(num, dtype=dtype)
    together = stacked.apply(make_config(**options), params, xs, ys)
    (together - ys).square().sum().backward()
    alone = torch.stack([member(xs[i], ys[i]) for i, member in enumerate(members)])
    (alone - ys).square().sum().backward()
    assert largest_relative_difference(together, alone) < tolerance
    for name, parameter in params.items():
        expected = torch.stack([dict(member.named_parameters())[name].grad for member in members])
        assert largest_relative_difference(parameter.grad, expected) < tolerance, name


@pytest.mark.parametrize("num_examples", range(1, K + 1))
def test_prompts_may_be_shared_and_shorter(num_examples):
    members = make_members()
    xs, ys = make_prompts(num_examples=num_examples)
    together = stacked.apply(make_config(), stack(members), xs, ys)
    assert largest_relative_difference(together, torch.stack([member(xs, ys) for member in members])) < 1e-12


def test_prompts_are_read_in_the_precision_of_the_weights():
    xs, ys = make_prompts(dtype=torch.float64)
    assert stacked.apply(make_config(), stack(make_members(dtype=torch.float32)), xs, ys).dtype == torch.float32


def test_the_last_target_is_seen_by_no_prediction():
    xs, ys = make_prompts()
    params = stack(make_members())
    changed = torch.cat([ys[:, :-1], torch.full_like(ys[:, -1:], torch.nan)], dim=1)
    assert torch.equal(stacked.apply(make_config(), params, xs, ys), stacked.apply(make_config(), params, xs, changed))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_of_all_tokens_are_the_definitions(options):
    members, (xs, ys) = make_members(**options), make_prompts()
    found = stacked.token_outputs(make_config(**options), stack(members), xs, ys)
    x_tokens, y_tokens = torch.zeros(2, B, K, D + 1, dtype=torch.float64)
    x_tokens[..., 1:], y_tokens[..., 0] = xs, ys
    tokens = torch.stack([x_tokens, y_tokens], dim=2).reshape(B, 2 * K, D + 1)
    future = torch.ones(2 * K, 2 * K, dtype=torch.bool).triu(1)
    for member, outputs in zip(members, found, strict=True):
        x = member.token_embedding(tokens) + member.position_embedding
        for block in member.blocks:
            x = block(x, future)
        assert largest_relative_difference(outputs, member.unembedding(member.final_norm(x))) < 1e-12
        assert largest_relative_difference(outputs[:, ::2, 0], member(xs, ys)) < 1e-12


def test_members_do_not_mix():
    params, (xs, ys) = leaves(make_members()), make_prompts(N)
    xs[0] = torch.nan
    predictions = stacked.apply(make_config(), params, xs, ys)
    predictions[1].sum().backward()
    assert predictions[0].isnan().all()
    assert all((tensor.grad[2] == 0).all() for tensor in params.values())
    assert all(tensor.grad[1].isfinite().all() for tensor in params.values())
