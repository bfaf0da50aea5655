"""The language model is the one of its formula: a loop over positions, TransformerLens, and the stacked form agree."""

import json
import math
from pathlib import Path

import pytest
import torch

from icl.config import ModelConfig
from icl.model.flat import layout_of
from icl.model.language import (
    LanguageModel,
    apply_language,
    attention_patterns,
    initialise_language,
    next_token_losses,
    rows_at_once,
)
from icl.model.losses import batch_losses, batch_parts, grads_in_parts
from icl.model.stacked import stack
from icl.model.transformer import shapes_of_module

V, T, B, N = 11, 9, 3, 2
OPTIONS = {
    "attention only, shortformer": {"positions": "shortformer"},
    "attention only, standard": {},
    "with MLPs, standard": {"mlp_size": 10},
    "with MLPs, shortformer": {"mlp_size": 10, "positions": "shortformer", "activation": "gelu_tanh"},
    "wide heads, one layer": {"num_layers": 1, "head_size": 8, "positions": "shortformer"},
    "three layers of one head": {"num_layers": 3, "num_heads": 1, "mlp_size": 4, "activation": "gelu"},
}
LENS = Path(__file__).with_name("transformer_lens.json")
"""Numbers of TransformerLens, recorded by `python tests/model/record_transformer_lens.py` where it is installed."""


def make_config(**options):
    base = {
        "family": "language",
        "num_heads": 2,
        "embed_size": 8,
        "mlp_size": 0,
        "attention_bias": True,
        "init": "normal",
    }
    return ModelConfig(**{**base, **options})


def make_model(config, seed=0, dtype=torch.float64, vocab_size=V, context_size=T):
    """Return a model with parameters so large that every part matters."""
    model = LanguageModel(config, vocab_size=vocab_size, context_size=context_size).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
            if name.endswith(".w"):
                parameter += 1
    return model


def make_rows(*leading, seed=5, num_tokens=T):
    return torch.randint(V, (*leading, B, num_tokens), generator=torch.Generator().manual_seed(seed))


def by_loops(model, row):
    """Return the logits of one row by loops over layers, positions and heads, from the formula in the module's docstring."""
    p, config = {name: tensor.detach().double() for name, tensor in model.named_parameters()}, model.config

    def norm(x, name):
        centred = x - x.mean()
        return centred / math.sqrt(float((centred**2).mean()) + 1e-5) * p[f"{name}.w"] + p[f"{name}.b"]

    def act(x):
        if config.activation == "relu":
            return max(x, 0.0)
        if config.activation == "gelu":
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    positions = [p["pos_embed.W_pos"][t] for t in range(len(row))]
    xs = [p["embed.W_E"][token] for token in row]
    if config.positions == "standard":
        xs, positions = [x + q for x, q in zip(xs, positions, strict=True)], [0 * q for q in positions]
    for layer in range(config.num_layers):
        at = f"blocks.{layer}."
        normed = [norm(x, f"{at}ln1") for x in xs]
        outs = [p[f"{at}attn.b_O"].clone() for _ in xs]
        for h in range(config.num_heads):
            weights = {part: (p[f"{at}attn.W_{part}"][h], p[f"{at}attn.b_{part}"][h]) for part in "QKV"}
            q, k = (
                [(u + place) @ weights[part][0] + weights[part][1] for u, place in zip(normed, positions, strict=True)]
                for part in "QK"
            )
            v = [u @ weights["V"][0] + weights["V"][1] for u in normed]
            for t in range(len(row)):
                scores = [math.exp(float(q[t] @ k[s]) / math.sqrt(len(q[t]))) for s in range(t + 1)]
                mixed = sum(score * v[s] for s, score in enumerate(scores)) / sum(scores)
                outs[t] = outs[t] + mixed @ p[f"{at}attn.W_O"][h]
        xs = [x + out for x, out in zip(xs, outs, strict=True)]
        if config.mlp_size:
            for t, x in enumerate(xs):
                hidden = norm(x, f"{at}ln2") @ p[f"{at}mlp.W_in"] + p[f"{at}mlp.b_in"]
                hidden = torch.tensor([act(float(value)) for value in hidden], dtype=torch.float64)
                xs[t] = x + hidden @ p[f"{at}mlp.W_out"] + p[f"{at}mlp.b_out"]
    return torch.stack([norm(x, "ln_final") @ p["unembed.W_U"] + p["unembed.b_U"] for x in xs])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_loops_over_the_formula(options):
    model, rows = make_model(make_config(**options)), make_rows()
    expected = torch.stack([by_loops(model, row) for row in rows])
    torch.testing.assert_close(model(rows), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num", [1, N])
def test_the_stacked_form_has_the_definitions_logits_and_gradients(options, num, dtype, tolerance):
    config = make_config(**options)
    members = [make_model(config, seed, dtype) for seed in range(num)]
    rows, targets = make_rows(num), make_rows(num, seed=6)
    leaves = {
        name: t.detach().requires_grad_() for name, t in stack([dict(m.named_parameters()) for m in members]).items()
    }
    logits = apply_language(config, leaves, rows)
    expected = torch.stack([model(part) for model, part in zip(members, rows, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))
    losses = next_token_losses(config, leaves, rows, targets)
    wanted = -expected.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=10 * tolerance)
    losses.sum().backward()
    wanted.sum().backward()
    for name, leaf in leaves.items():
        grads = torch.stack([dict(model.named_parameters())[name].grad for model in members])
        scale = max(float(grads.abs().max()), 1.0)
        torch.testing.assert_close(leaf.grad, grads, rtol=0, atol=10 * tolerance * scale, msg=name)


def test_long_rows_use_fused_attention_and_have_the_same_logits():
    config = make_config(positions="shortformer")
    model = make_model(config, context_size=200)
    rows = make_rows(num_tokens=200)
    logits = apply_language(config, stack([dict(model.named_parameters())]), rows)[0]
    torch.testing.assert_close(logits, model(rows), rtol=1e-11, atol=1e-11)


def test_patterns_are_the_attention_of_the_definition_and_rows_of_one():
    config = make_config(positions="shortformer", mlp_size=4)
    model, rows = make_model(config), make_rows()
    params = stack([dict(model.named_parameters())])
    queries = torch.tensor([[8, 2], [3, 3], [0, 5]])
    patterns = attention_patterns(config, params, rows, queries)[0].detach()  # B L H Q T
    seen = {}

    def record(layer, attn, inputs, output):
        x, positions, future = inputs
        q, k = (
            (
                torch.einsum("btc,hcd->bhtd", x + positions, getattr(attn, f"W_{part}"))
                + getattr(attn, f"b_{part}")[:, None]
            )
            for part in "QK"
        )
        seen[layer] = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf).softmax(-1)

    for layer, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *args, layer=layer: record(layer, *args))
    model(rows)
    for b, chosen in enumerate(queries):
        for layer in range(2):
            torch.testing.assert_close(patterns[b, layer], seen[layer][b][:, chosen], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(patterns.sum(-1), torch.ones_like(patterns[..., 0]))


def test_later_tokens_do_not_change_earlier_logits():
    model, rows = make_model(make_config(mlp_size=4)), make_rows()
    changed = rows.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert torch.equal(model(rows)[:, :5], model(changed)[:, :5])
    assert not torch.equal(model(rows)[:, 5], model(changed)[:, 5])


@pytest.mark.parametrize(("num_layers", "count", "norm"), [(2, 3_355_016, 95.6), (1, 3_091_336, 90.7)])
def test_the_published_model_has_its_published_size_and_norm(num_layers, count, norm):
    config = make_config(num_layers=num_layers, num_heads=8, embed_size=256, positions="shortformer")
    model = LanguageModel(config, vocab_size=5000, context_size=1024)
    initialise_language(model, torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert shapes_of_module(LanguageModel, config, vocab_size=5000, context_size=1024).num_params == count
    total = math.sqrt(sum(float(parameter.detach().square().sum()) for parameter in model.parameters()))
    assert total == pytest.approx(norm, abs=0.1)


def test_names_are_those_of_transformer_lens():
    names = set(
        dict(LanguageModel(make_config(num_layers=1, mlp_size=4), vocab_size=V, context_size=T).named_parameters())
    )
    attention = {f"blocks.0.attn.{kind}_{part}" for kind in "Wb" for part in "QKVO"}
    norms = {f"{name}.{leaf}" for name in ("blocks.0.ln1", "blocks.0.ln2", "ln_final") for leaf in "wb"}
    mlp = {f"blocks.0.mlp.{kind}_{side}" for kind in "Wb" for side in ("in", "out")}
    assert names == attention | norms | mlp | {"embed.W_E", "pos_embed.W_pos", "unembed.W_U", "unembed.b_U"}


def test_tokens_and_lengths_outside_the_model_are_refused():
    model = make_model(make_config())
    with pytest.raises(ValueError, match="from 0 to 10, got"):
        model(torch.full((1, 3), V))
    with pytest.raises(ValueError, match=r"T from 1 to 9, got \(1, 10\)"):
        model(torch.zeros(1, T + 1, dtype=torch.int64))


def _saved_numbers(config, params, rows):
    """Return the count of numbers that autograd keeps for rows, without those of the parameters."""
    saved, own = {}, {tensor.untyped_storage()._cdata for tensor in params.values()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes() // 8
        return tensor

    leaves = {name: tensor.requires_grad_() for name, tensor in params.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = next_token_losses(config, leaves, rows, rows)
    del losses
    return sum(saved.values())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_tokens", [40, 200])
def test_rows_at_once_keeps_what_autograd_saves_below_the_bound(options, num_tokens):
    config = make_config(**options)
    params = stack([dict(make_model(config, context_size=num_tokens).named_parameters())])
    params = {name: tensor.detach() for name, tensor in params.items()}
    one_row = num_tokens * (
        2 * V + config.num_layers * (8 * 8 + 8 * config.heads_width + 2 * config.num_heads * num_tokens)
    )
    bound = 8 * one_row
    size = rows_at_once(config, params, num_tokens, max_numbers=bound)
    assert size > 1
    rows = make_rows(num_tokens=num_tokens)[:1].expand(size, -1)
    weights = sum(
        tensor.numel() for tensor in params.values()
    )  # rearranged copies of matrices, which no batch enlarges
    assert _saved_numbers(config, params, rows) <= bound + 2 * weights
    assert rows_at_once(config, params, num_tokens, max_numbers=1) == 1


def test_a_batch_in_parts_has_the_losses_and_the_gradient_of_the_whole(monkeypatch):
    config = make_config(mlp_size=6)
    params = {
        n: t.detach()
        for n, t in stack([dict(make_model(config, seed).named_parameters()) for seed in range(N)]).items()
    }
    layout = layout_of(params)
    rows, xs, ys = layout.to_rows(params), make_rows(N), make_rows(N, seed=6)

    def combine(losses):
        means = losses.mean(dim=(1, 2))
        return means.sum(), means

    def compute():
        return (
            *grads_in_parts(config, layout.to_params, combine, rows, (xs, ys)),
            batch_losses(config, params, xs, ys),
        )

    whole = compute()
    assert len(batch_parts(config, params, xs, ys)) == 1
    monkeypatch.setattr("icl.model.losses.rows_at_once", lambda *args: 2)
    assert [len(part[0][0]) for part in batch_parts(config, params, xs, ys)] == [2, 1]
    for ours, expected in zip(compute(), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def lens_cases():
    return json.loads(LENS.read_text())["cases"] if LENS.exists() else []


@pytest.mark.parametrize("case", lens_cases(), ids=lambda case: case["name"])
def test_logits_are_those_that_transformer_lens_gave(case):
    model = make_model(make_config(**case["options"]), dtype=torch.float32)
    ours = model(torch.tensor(case["rows"])).detach()
    torch.testing.assert_close(
        ours, torch.tensor(case["logits"]), rtol=0, atol=1e-5 * max(1.0, float(ours.abs().max()))
    )


def test_logits_are_those_of_transformer_lens():
    pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install icl[lens]")
    from tests.model.record_transformer_lens import lens_logits

    for name, options in OPTIONS.items():
        model = make_model(make_config(**options), dtype=torch.float32)
        expected = lens_logits(model, make_rows())
        torch.testing.assert_close(
            model(make_rows()).detach(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=name
        )
