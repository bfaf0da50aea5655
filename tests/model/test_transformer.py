"""The model compared with an independent implementation in plain loops; its causality, sizes and initial weights."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from icl.build import build_model
from icl.config import ModelConfig, RunConfig, SeedsConfig, TaskConfig
from icl.model.transformer import Attention, Transformer, initialise
from icl.presets import preset

SMALL = {"num_layers": 2, "num_heads": 2, "embed_size": 6, "mlp_size": 5}
D, K, B = 3, 4, 2


def make_model(*, task_size=D, max_examples=K, dtype=torch.float64, **options):
    """Return a model in which every parameter is random, including norms and biases."""
    config = ModelConfig(**{**SMALL, **options})
    model = Transformer(config, task_size=task_size, max_examples=max_examples).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.6, generator=generator)
    return model


def make_prompts(batch_size=B, num_examples=K, task_size=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(batch_size, num_examples, task_size, generator=generator, dtype=dtype)
    return xs, torch.randn(batch_size, num_examples, generator=generator, dtype=dtype)


# The forward pass in plain loops, one prompt at a time, from the formulas


def affine(weights, name, x):
    out = np.array([sum(w * v for w, v in zip(row, x, strict=True)) for row in weights[f"{name}.weight"]])
    return out + weights.get(f"{name}.bias", 0.0)


def layer_norm(weights, name, x):
    """Layer norm of Ba et al. 2016: the variance is a sum divided by C, and epsilon = 1e-5 is inside the root."""
    if f"{name}.weight" not in weights:
        return x
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def activate(kind, x):
    """GELU and its tanh approximation of Hendrycks and Gimpel 2016."""
    if kind == "relu":
        return np.array([max(value, 0.0) for value in x])
    if kind == "gelu":
        return np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])
    return np.array(
        [value / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) for value in x]
    )


def attend(weights, name, stream, num_heads):
    """Attention of Vaswani et al. 2017. The fused projection has q, k, v of head 1, then those of head 2, and so on."""
    size = len(stream[0]) // num_heads
    fused = [affine(weights, f"{name}.qkv", x) for x in stream]
    out = []
    for t in range(len(stream)):
        gathered = []
        for head in range(num_heads):
            start = 3 * size * head
            query = fused[t][start : start + size]
            scores = [query @ fused[s][start + size : start + 2 * size] / math.sqrt(size) for s in range(t + 1)]
            shares = [math.exp(score - max(scores)) for score in scores]
            values = [fused[s][start + 2 * size : start + 3 * size] for s in range(t + 1)]
            gathered.append(sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares))
        joined = np.concatenate(gathered)
        out.append(affine(weights, f"{name}.output", joined) if f"{name}.output.weight" in weights else joined)
    return out


def forward_by_hand(weights, config, xs, ys):
    """Return the predictions of one prompt, from xs (K, D) and ys (K)."""
    tokens = []
    for x, y in zip(xs, ys, strict=True):
        tokens += [np.array([0.0, *x]), np.array([y, *(0.0 for _ in x)])]
    stream = [
        affine(weights, "token_embedding", token) + weights["position_embedding"][t]
        for t, token in enumerate(tokens[:-1])
    ]

    def mlp(name, x):
        return affine(weights, f"{name}.output", activate(config.activation, affine(weights, f"{name}.hidden", x)))

    for layer in range(config.num_layers):
        name, entering = f"blocks.{layer}", stream
        if config.layer_norm == "post":
            gathered = attend(weights, f"{name}.attention", stream, config.num_heads)
            stream = [
                layer_norm(weights, f"{name}.attention_norm", a + b) for a, b in zip(stream, gathered, strict=True)
            ]
            stream = [layer_norm(weights, f"{name}.mlp_norm", x + mlp(f"{name}.mlp", x)) for x in stream]
        else:
            normed = [layer_norm(weights, f"{name}.attention_norm", x) for x in stream]
            gathered = attend(weights, f"{name}.attention", normed, config.num_heads)
            stream = [a + b for a, b in zip(stream, gathered, strict=True)]
            stream = [x + mlp(f"{name}.mlp", layer_norm(weights, f"{name}.mlp_norm", x)) for x in stream]
        if config.double_residual:
            stream = [a + b for a, b in zip(entering, stream, strict=True)]
    return [affine(weights, "unembedding", layer_norm(weights, "final_norm", x))[0] for x in stream[::2]]


VARIANTS = [
    {"layer_norm": "pre"},
    {"layer_norm": "post"},
    {"layer_norm": "none"},
    {"layer_norm": "pre", "attention_output": False},
    {"layer_norm": "post", "attention_output": False, "attention_bias": True},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"embedding_bias": True, "attention_bias": True},
    {"mlp_bias": False, "unembedding_bias": False},
    {"output": "scalar"},
    {"output": "scalar", "unembedding_bias": False},
    {"double_residual": True},
    {"double_residual": True, "layer_norm": "post"},
    {"double_residual": True, "layer_norm": "none", "num_layers": 3},
    {"num_heads": 1},
    {"num_heads": 6},
    {"num_layers": 1},
]


def name_of(value):
    return ",".join(f"{key}={choice}" for key, choice in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_predictions_agree_with_a_transcription_in_plain_loops(options):
    model, (xs, ys) = make_model(**options), make_prompts()
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    config = ModelConfig(**{**SMALL, **options})
    expected = [forward_by_hand(weights, config, x, y) for x, y in zip(xs.numpy(), ys.numpy(), strict=True)]
    np.testing.assert_allclose(model(xs, ys).detach().numpy(), np.array(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_is_that_of_pytorch(num_heads, dtype, tolerance):
    attention = make_model(num_heads=num_heads, embed_size=16, dtype=dtype).blocks[0].attention
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    q, k, v = (attention.qkv(x).reshape(3, 7, num_heads, 3, -1)[:, :, :, part].transpose(1, 2) for part in range(3))
    gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 7, 16)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(attention(x, future), attention.output(gathered), rtol=tolerance, atol=tolerance)


def test_attention_without_output_projection_has_none():
    names = {name for name, _ in Attention(ModelConfig(attention_output=False)).named_parameters()}
    assert names == {"qkv.weight"}


# Causality


@pytest.mark.parametrize("options", VARIANTS[:4] + VARIANTS[11:13], ids=name_of)
@pytest.mark.parametrize("k", range(K))
def test_prediction_has_exactly_zero_gradient_with_respect_to_what_comes_after_its_input(k, options):
    model, (xs, ys) = make_model(**options), make_prompts()
    model(xs.requires_grad_(), ys.requires_grad_())[:, k].sum().backward()
    assert (xs.grad[:, k + 1 :] == 0).all()
    assert (ys.grad[:, k:] == 0).all()


@pytest.mark.parametrize("k", range(K))
def test_prediction_depends_on_every_number_before_it(k):
    model, (xs, ys) = make_model(), make_prompts()
    model(xs.requires_grad_(), ys.requires_grad_())[:, k].sum().backward()
    assert (xs.grad[:, : k + 1] != 0).all()
    assert (ys.grad[:, :k] != 0).all()


def test_prompts_of_a_batch_do_not_mix():
    model, (xs, ys) = make_model(), make_prompts(batch_size=3)
    model(xs.requires_grad_(), ys)[1].sum().backward()
    assert (xs.grad[[0, 2]] == 0).all()


@given(length=st.integers(1, K), layer_norm=st.sampled_from(["pre", "post", "none"]))
def test_predictions_for_a_shorter_prompt_are_those_of_its_place_in_the_long_one(length, layer_norm):
    model, (xs, ys) = make_model(layer_norm=layer_norm), make_prompts()
    short = model(xs[:, :length], ys[:, :length])
    assert short.shape == (B, length)
    torch.testing.assert_close(short, model(xs, ys)[:, :length], rtol=1e-13, atol=1e-13)


def test_last_target_changes_nothing():
    model, (xs, ys) = make_model(), make_prompts()
    changed = ys.clone()
    changed[:, -1] += 100
    assert torch.equal(model(xs, ys), model(xs, changed))


def test_batch_of_prompts_is_the_prompts_one_at_a_time():
    model, (xs, ys) = make_model(), make_prompts(batch_size=5)
    alone = torch.cat([model(x[None], y[None]) for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(model(xs, ys), alone, rtol=1e-13, atol=1e-13)


def test_examples_do_not_commute_because_positions_are_learned():
    model, (xs, ys) = make_model(), make_prompts()
    order = [1, 0, 2, 3]
    assert not torch.allclose(model(xs, ys)[:, 3], model(xs[:, order], ys[:, order])[:, 3])


# Prompts that do not fit


@pytest.mark.parametrize(
    ("xs_shape", "ys_shape", "message"),
    [
        ((B, K, D + 1), (B, K), "inputs of size D = 3, got 4"),
        ((B, K + 1, D), (B, K + 1), "1 to K = 4 examples per prompt, got 5"),
        ((B, 0, D), (B, 0), "1 to K = 4 examples per prompt, got 0"),
        ((K, D), (K,), r"Expected xs \(B, K, D\) and ys \(B, K\), got \(4, 3\) and \(4,\)"),
        ((B, K, D), (B, K - 1), r"Expected xs \(B, K, D\) and ys \(B, K\), got \(2, 4, 3\) and \(2, 3\)"),
        ((B, K, D), (B, K, 1), r"got \(2, 4, 3\) and \(2, 4, 1\)"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_with_both_sizes(as_users_run, xs_shape, ys_shape, message):
    with pytest.raises(ValueError, match=message):
        make_model()(torch.zeros(xs_shape, dtype=torch.float64), torch.zeros(ys_shape, dtype=torch.float64))


# Sizes


def count(config):
    return sum(parameter.numel() for parameter in build_model(config).parameters())


def l2h4(max_examples=8, **options):
    base = preset("L2H4")
    task = dataclasses.replace(base.task, max_examples=max_examples)
    return dataclasses.replace(base, task=task, model=dataclasses.replace(base.model, **options))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", 17_603),  # 96 tokens + 512 positions + 2 x 8,416 block + 64 norm + 99 unembedding
        ("prior-quickstart", 4_860),  # 48 tokens + 256 positions + 2 x 2,160 block + 32 norm + 204 unembedding
        ("transience", 68_100),
        ("sparse-tasks", 17_603),
        ("walking-pool", 17_603),
        ("L2H4", 51_717),
        ("raventos-base", 1_591_808),
        ("raventos-small", 202_752),
        ("carroll", 2_654_217),
        ("icr", 4_761_097),  # 5,120 tokens + 16,384 positions + 3 x 1,577,984 block + 1,024 norm + 4,617 unembedding
    ],
)
def test_preset_has_its_exact_number_of_parameters(name, expected):
    assert count(preset(name)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_examples": 16}, 52_741),
        ({"attention_output": False}, 43_525),
        ({"layer_norm": "none"}, 51_077),
        ({"layer_norm": "post"}, 51_717),
        ({"double_residual": True}, 51_717),
    ],
    ids=name_of,
)
def test_variant_of_l2h4_has_its_exact_number_of_parameters(options, expected):
    assert count(l2h4(**options)) == expected


def test_layer_table_of_l2h4_is_the_published_one():
    """The numbers of PAPERS.md, 1.1: 320 token + 1,024 position + 2 x 24,960 block + 128 layer norm + 325 unembedding."""
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in build_model(l2h4()).named_children()}
    assert sizes == {"token_embedding": 320, "blocks": 2 * 24_960, "final_norm": 128, "unembedding": 325}
    assert build_model(l2h4()).position_embedding.numel() == 1024


# Initial weights


def weights_of(config):
    return {name: parameter.detach() for name, parameter in build_model(config).named_parameters()}


def wide(**options):
    return RunConfig(task=TaskConfig(task_size=8, max_examples=16), model=ModelConfig(**options))


BIASES = {"embedding_bias": True, "attention_bias": True}
WIDE = {"embed_size": 64, "num_heads": 4, "mlp_size": 128, **BIASES}
FAN_IN = {"token_embedding": 9, "position_embedding": 32, "qkv": 64, "output": 64, "hidden": 64, "unembedding": 64}


def fan_in(name):
    """Return the number of inputs of a parameter's linear map. Position embeddings map 2K one-hot inputs."""
    if ".mlp.output." in name:
        return 128
    return FAN_IN[name.rpartition(".")[0].rpartition(".")[2] or name]


def drawn(config):
    return {name: weight for name, weight in weights_of(config).items() if "norm" not in name}


def test_pytorch_weights_lie_within_one_over_the_root_of_the_fan_in():
    """They also fill this range: the largest of n uniform numbers is below the bound by more than 15 / n only once in e^15 cases."""
    for name, weight in drawn(wide(**WIDE)).items():
        bound = 1 / math.sqrt(fan_in(name))
        assert bound * (1 - 15 / weight.numel()) < weight.abs().max() <= bound, name


def test_pytorch_weights_have_the_variance_of_a_uniform_law():
    """The mean is 0 and the variance b^2 / 3. The fourth moment of a uniform distribution is 9/5 of its squared variance."""
    for name, weight in drawn(wide(**WIDE)).items():
        variance, num = 1 / (3 * fan_in(name)), weight.numel()
        assert abs(weight.double().square().mean() - variance) < 4.5 * variance * math.sqrt(0.8 / num), name
        assert abs(weight.double().mean()) < 4.5 * math.sqrt(variance / num), name


def test_gpt2_weights_have_a_deviation_of_2_percent_and_less_on_the_way_to_the_residual_stream():
    """The standard deviation is 0.02, and 0.02 / sqrt(2L) for the output projections of attention and MLP."""
    for name, weight in drawn(wide(init="gpt2", num_layers=3, **WIDE)).items():
        if name.endswith("bias"):
            continue
        variance, num = 0.0004 / (6 if name.endswith("output.weight") else 1), weight.numel()
        assert abs(weight.double().square().mean() - variance) < 4.5 * variance * math.sqrt(2 / num), name
        assert abs(weight.double().mean()) < 4.5 * math.sqrt(variance / num), name


def test_gpt2_biases_are_zero():
    biases = [weight for name, weight in drawn(wide(init="gpt2", **WIDE)).items() if name.endswith("bias")]
    assert len(biases) == 1 + 2 * 4 + 1
    assert all((bias == 0).all() for bias in biases)


@pytest.mark.parametrize("init", ["pytorch", "gpt2"])
def test_layer_norms_start_as_the_identity(init):
    norms = {name: weight for name, weight in weights_of(wide(init=init)).items() if "norm" in name}
    assert len(norms) == 2 * 5
    for name, weight in norms.items():
        assert (weight == (1.0 if name.endswith("weight") else 0.0)).all(), name


@pytest.mark.parametrize("seed", range(5))
def test_initial_norm_of_l2h4_is_that_of_the_released_checkpoints(seed):
    """PAPERS.md, 10: 24.91 to 24.97 over five seeds, each with a deviation of 0.03. The expected norm is sqrt(621.7) = 24.93."""
    config = dataclasses.replace(l2h4(), seeds=SeedsConfig(model=seed))
    norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights_of(config).values()))
    assert 24.91 - 0.03 < norm < 24.97 + 0.03


@pytest.mark.parametrize("init", ["pytorch", "gpt2"])
def test_initial_weights_depend_on_the_seed_of_the_model_alone(init):
    first = weights_of(wide(init=init))
    other = dataclasses.replace(
        wide(init=init),
        task=TaskConfig(task_size=8, max_examples=16, num_tasks=3, noise_variance=0.0),
        seeds=SeedsConfig(tasks=1, data=2, noise=3, evaluation=4),
    )
    assert all(torch.equal(first[name], weight) for name, weight in weights_of(other).items())


def test_other_seed_of_the_model_changes_every_drawn_weight():
    first, second = (drawn(dataclasses.replace(wide(), seeds=SeedsConfig(model=seed))) for seed in (0, 1))
    assert not any((first[name] == second[name]).any() for name in first)


def test_building_neither_reads_nor_sets_the_global_generator():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), weights_of(wide())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(first[name], weight) for name, weight in weights_of(wide()).items())


def test_every_parameter_is_set():
    model = Transformer(ModelConfig(), task_size=2, max_examples=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialise(model, ModelConfig(), torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_initial_model_of_gpt2_style_predicts_almost_nothing():
    """Weights of size 0.02 make the first predictions small compared with the targets, whose size is sqrt(D)."""
    xs, ys = make_prompts(64, 16, 8, torch.float32)
    assert build_model(preset("raventos-small"))(xs, ys).abs().max() < 1


# CUDA


@pytest.mark.gpu
def test_predictions_on_cuda_agree_with_those_on_the_cpu():
    model, (xs, ys) = make_model(), make_prompts()
    expected = model(xs, ys)
    torch.testing.assert_close(model.cuda()(xs.cuda(), ys.cuda()).cpu(), expected, rtol=1e-12, atol=1e-12)
