"""The rescaling control changes the weights but not the function."""

import dataclasses

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, change

from icl.build import build_model
from icl.cli.llc_output import compare_rescaled
from icl.config.validation import ConfigError
from icl.model.stacked import apply, stack
from icl.sampling.rescaling import describe_pair, rescaled
from icl.tasks.prompts import sample_prompts


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"activation": "relu", "num_layers": 2}, "ReLU"),
        ({"activation": "relu", "layer_norm": "none"}, "ReLU"),
        ({"activation": "gelu", "attention_bias": True, "layer_norm": "post"}, "values"),
        ({"activation": "gelu", "attention_output": False}, "norm"),
    ],
)
def test_the_function_is_unchanged_and_the_weights_are_not(model, words):
    config = change(TINY, model=model)
    params = {name: tensor.detach().double() for name, tensor in build_model(config).named_parameters()}
    generator = torch.Generator().manual_seed(1)
    params = {name: t + 0.1 * torch.randn(t.shape, generator=generator).double() for name, t in params.items()}
    other = rescaled(config.model, params, 3.0)
    xs, ys, _ = sample_prompts(config, stream="true", step=0, batch_size=8)
    before, after = (apply(config.model, stack([one]), xs, ys) for one in (params, other))
    torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-12)
    changed = [name for name in params if not torch.equal(params[name], other[name])]
    assert len(changed) >= 2 * config.model.num_layers
    assert words in describe_pair(config.model)


def test_a_factor_of_one_changes_nothing():
    params = {name: tensor.detach() for name, tensor in build_model(TINY).named_parameters()}
    assert all(torch.equal(rescaled(TINY.model, params, 1.0)[name], params[name]) for name in params)


@pytest.mark.parametrize(("model", "factor"), [({}, 0.0), ({}, float("nan"))])
def test_a_bad_factor_is_refused(model, factor):
    with pytest.raises(ConfigError, match="positive and finite"):
        rescaled(TINY.model, {}, factor)


def test_an_architecture_without_a_pair_is_refused():
    model = dataclasses.replace(TINY.model, activation="gelu", attention_output=False, layer_norm="post")
    with pytest.raises(ConfigError, match="has none"):
        rescaled(model, {}, 2.0)


def test_estimates_are_compared_in_their_joint_error():
    plain = pd.DataFrame({"step": [1, 2, 3], "checkpoint_hash": list("abc"), "llc": [10.0, 10.0, 10.0], "stderr": 1.0})
    control = plain.assign(llc=[11.0, 20.0, float("nan")])
    lines = compare_rescaled(plain, control)
    assert ["agrees" in lines[0], "differs" in lines[1], "cannot be compared" in lines[2]] == [True] * 3
    assert "+7.1 standard errors" in lines[1]
    assert "1 of 3 differ" in lines[3]
    assert "size of the weights" in lines[3]
