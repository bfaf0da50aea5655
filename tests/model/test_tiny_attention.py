"""The attention kernel compared with its formula in float64: values, gradients, second derivatives, causality and threads."""

import ctypes.util
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch
from torch.autograd import grad

from icl.model import attention as tiny_attention
from icl.model.attention import HAS_KERNEL, attention, attention_by_formula

needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no compiler when icl was installed")

LANES = [lanes for lanes in (16, 8, 4) if lanes <= tiny_attention._LANES]
SIZES = {  # heads, tokens, channels of a head, stride
    "L2H4": (4, 15, 16, 1),
    "L2H4, last block": (4, 15, 16, 2),
    "quickstart": (4, 15, 8, 1),
    "whole vectors": (4, 16, 16, 1),
    "raventos": (2, 31, 64, 2),
    "one token": (1, 1, 1, 1),
    "odd": (3, 7, 5, 2),
    "queries of two vectors and a bit": (2, 37, 3, 1),
    "channels of every vector": (1, 6, 16 + 8 + 3, 1),
    "a last block of four that overlaps another vector": (2, 66, 3, 2),
    "stride 3": (1, 50, 4, 3),
}


def make_inputs(sizes, *, num_prompts=9, spread=2.0, dtype=torch.float32):
    heads, tokens, channels, stride = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_prompts, length, heads * channels) for length in (-(-tokens // stride), tokens, tokens)]
    inputs = [torch.randn(shape, generator=generator).mul(spread).to(dtype).requires_grad_() for shape in shapes]
    return inputs, {"num_heads": heads, "stride": stride}


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def test_a_kernel_that_was_compiled_is_used():
    was_compiled = find_spec("icl.model._attention") is not None
    assert was_compiled == HAS_KERNEL


@needs_kernel
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_as_near_the_truth_as_the_formula_s(sizes, lanes, monkeypatch):
    monkeypatch.setattr(tiny_attention, "_LANES", lanes)
    inputs, options = make_inputs(sizes)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    truth = attention_by_formula(*exact, **options)
    truths = [truth, *grad(truth, exact, weights.double())]
    found = {}
    for way in (attention, attention_by_formula):
        out = way(*inputs, **options)
        found[way] = [out, *grad(out, inputs, weights)]
    for kernel, formula, expected in zip(found[attention], found[attention_by_formula], truths, strict=True):
        assert relative_error(kernel, expected) < max(2 * relative_error(formula, expected), 5e-7)


@needs_kernel
def test_second_derivatives_are_the_formula_s():
    inputs, options = make_inputs((2, 6, 4, 1), num_prompts=2)

    def curvature(way):
        out = way(*inputs, **options)
        first = grad(out.square().sum(), inputs, create_graph=True)
        return grad(sum(one.square().sum() for one in first), inputs)

    for found, expected in zip(curvature(attention), curvature(attention_by_formula), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())


@needs_kernel
def test_mapped_members_are_those_alone():
    (queries, keys, values), options = make_inputs((2, 8, 4, 2), num_prompts=3)

    def loss(queries, keys, values):
        return attention(queries[None], keys[None], values[None], **options).square().sum()

    mapped = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, 1), out_dims=(0, 0, 1))
    found = mapped(queries, keys[0], values.transpose(0, 1))
    for member in range(2):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(queries[member], keys[0], values[member])
        for one, all_of_them in zip(alone, (found[0], found[1], found[2].transpose(0, 1)), strict=True):
            torch.testing.assert_close(all_of_them[member], one, rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("sizes", [SIZES["L2H4"], SIZES["odd"]])
def test_later_tokens_change_no_bit(sizes):
    (queries, keys, values), options = make_inputs(sizes)
    seen = sizes[1] // 2
    before = attention(queries, keys, values, **options)
    with torch.no_grad():
        keys[:, :, seen + 1 :], values[:, :, seen + 1 :] = 1e6, -1e6
    num_blind = seen // options["stride"] + 1
    assert torch.equal(before[:, :, :num_blind], attention(queries, keys, values, **options)[:, :, :num_blind])


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    inputs, options = make_inputs(SIZES["L2H4"], num_prompts=101)

    def run():
        out = attention(*inputs, **options)
        return [out, *grad(out.square().sum(), inputs)]

    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(3)
        assert all(torch.equal(*pair) for pair in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(num_threads)


@needs_kernel
def test_what_is_not_finite_stays_with_its_prompt():
    (queries, keys, values), options = make_inputs(SIZES["L2H4"])
    clean = attention(queries, keys, values, **options)
    for poison in (torch.nan, torch.inf):
        poisoned = keys.detach().clone()
        poisoned[1, 3, 0] = poison
        found = attention(queries, poisoned, values, **options)
        assert found[1, 3].isnan().all()
        found[1, 3] = clean[1, 3]
        assert torch.equal(found, clean)


@needs_kernel
def test_scores_beyond_the_exponential_s_range_are_a_choice_of_one():
    (queries, keys, values), options = make_inputs(SIZES["L2H4"], spread=300.0)
    torch.testing.assert_close(
        attention(queries, keys, values, **options), attention_by_formula(queries, keys, values, **options)
    )


@needs_kernel
def test_what_the_kernel_would_misread_is_refused():
    (queries, keys, values), options = make_inputs(SIZES["L2H4"])
    with pytest.raises(ValueError, match="Got 4 heads, stride 2 and float32"):
        attention(queries, keys, values, **options | {"stride": 2})
    with pytest.raises(ValueError, match="stride 0"):
        attention(queries, keys, values, **options | {"stride": 0})
    with pytest.raises(ValueError, match="Got -4 heads"):
        attention(queries, keys, values, **options | {"num_heads": -4})
    with pytest.raises(ValueError, match="bfloat16"):
        attention(queries, keys.bfloat16(), values, **options)
    with pytest.raises(ValueError, match="Got 4 heads"):
        torch.ops.icl.attention_forward(queries[0], keys[0, 1:], values[0, 1:], 4, 1)


def test_other_precisions_go_by_the_formula():
    inputs, options = make_inputs(SIZES["odd"], dtype=torch.float64)
    assert torch.equal(attention(*inputs, **options), attention_by_formula(*inputs, **options))


def test_without_a_kernel_the_formula_is_used(monkeypatch):
    inputs, options = make_inputs(SIZES["odd"])
    monkeypatch.setattr(tiny_attention, "HAS_KERNEL", False)
    assert torch.equal(attention(*inputs, **options), attention_by_formula(*inputs, **options))


def test_a_kernel_that_cannot_be_loaded_is_no_kernel(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(OSError, match=r"broken\.so"):
        ctypes.CDLL(broken)
    monkeypatch.setattr(tiny_attention, "find_spec", lambda name: ModuleSpec(name, None, origin=str(broken)))
    assert tiny_attention._compiled_kernel() is None


@needs_kernel
def test_a_kernel_of_another_version_is_told_and_not_used(monkeypatch, tmp_path):
    source = tmp_path / "attention.cpp"
    source.write_bytes(tiny_attention._SOURCE.read_bytes() + b"// changed")
    monkeypatch.setattr(tiny_attention, "_SOURCE", source)
    with pytest.warns(UserWarning, match="pip install -e"):
        assert tiny_attention._compiled_kernel() is None
    older = ModuleSpec("older", None, origin=ctypes.util.find_library("m"))  # has none of the kernel's names
    monkeypatch.setattr(tiny_attention, "find_spec", lambda name: older)
    with pytest.warns(UserWarning, match="pip install -e"):
        assert tiny_attention._compiled_kernel() is None
