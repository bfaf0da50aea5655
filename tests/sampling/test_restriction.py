"""Restrictions of the sampled parameters: any shape converts to a row and back, and fixed parameters never move."""

import pytest
import torch

from icl.config.validation import ConfigError
from icl.model.flat import restricted_layout
from icl.sampling import estimate_llc, known

SETTINGS = {"lr": 1e-3, "nbeta": 100.0, "localization": 5.0, "num_chains": 4, "seed": 3}
SHORT = {"num_draws": 6, "num_burnin_steps": 4}


def members(*, num=3):
    """Return stacked parameters with every number of axes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"number": (), "one": (1,), "vector": (4,), "matrix": (2, 3), "cube": (2, 1, 2)}
    return {name: torch.randn(num, *shape, generator=generator) for name, shape in shapes.items()}


def masks(params, *, share):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(tensor.shape[1:], generator=generator) < share for name, tensor in params.items()}


@pytest.mark.parametrize("kind", ["all", "names", "masks", "whole masks"])
def test_what_goes_into_a_row_comes_back_whatever_its_shape(kind):
    params = members()
    restrict = {
        "all": None,
        "names": ["number", "m*"],
        "masks": {**masks(params, share=0.5), "number": torch.tensor(True)},
        "whole masks": masks(params, share=2.0),
    }[kind]
    layout = restricted_layout({name: tensor[0] for name, tensor in params.items()}, restrict)
    rows, fixed = layout.to_rows(params), layout.fixed(params)
    assert rows.shape == (3, layout.width)
    assert layout.width % 16 == 0
    assert not rows[:, layout.size :].any()
    back = layout.to_params(rows, fixed)
    assert back.keys() == params.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, params[name])
    moved = layout.to_params(rows + 1, fixed)
    assert sum(int((moved[name] != params[name]).sum()) for name in params) == 3 * layout.size


def loss(params, batch):
    """Return the same loss for a number a and for a vector with one element."""
    return (params["a"] - 0.1).square().sum() / 2 + (params["b"] * params["a"].sum()).square().sum()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kernel", ["sgld", "rmsprop", "baoab"])
@pytest.mark.parametrize("restrict", [None, ["a"], ["b"], {"a": True, "b": [True, False]}], ids=str)
def test_a_number_moves_as_a_vector_of_one_does(restrict, kernel, vectorize):
    def estimate(shape):
        params = {"a": torch.full(shape, 0.1), "b": torch.tensor([0.5, 0.0])}
        told = restrict
        if isinstance(told, dict):
            told = {name: torch.tensor(mask).reshape(params[name].shape) for name, mask in told.items()}
        return estimate_llc(
            loss, params, [None], restrict=told, kernel=kernel, vectorize=vectorize, **SETTINGS, **SHORT
        )

    number, vector = estimate(()), estimate((1,))
    assert torch.equal(number.loss_trace, vector.loss_trace)
    assert number.loss_trace.std() > 0
    assert number.num_params == vector.num_params


def test_the_llc_of_one_number_is_the_exact_one():
    result = estimate_llc(
        lambda params, batch: params["a"].square() / 2,
        {"a": torch.tensor(0.0)},
        [None],
        num_draws=250,
        num_burnin_steps=50,
        **{**SETTINGS, "lr": 5e-3, "num_chains": 16},
    )
    exact = known.quadratic_llc(torch.ones(1), nbeta=100.0, localization=5.0, lr=5e-3)
    assert result.llc == pytest.approx(exact, abs=4 * result.stderr)
    assert result.stderr < 0.1 * exact


@pytest.mark.parametrize(
    ("restrict", "said"),
    [
        (3, "`restrict` must be names"),
        ([torch.ones(1)], "`restrict` must be names"),
        ({"number": True}, "The mask of `number` must be a Boolean tensor of shape (), got bool"),
        ({"number": torch.tensor([True])}, "got torch.bool of shape (1,)"),
        ({"number": torch.tensor(1.0)}, "got torch.float32 of shape ()"),
        ({"number": torch.tensor(False)}, "no parameter free"),
    ],
)
def test_a_restriction_that_fits_nothing_is_one_sentence(restrict, said, as_users_run):
    one = {name: tensor[0] for name, tensor in members().items()}
    with pytest.raises(ConfigError, match=r"^[^\n]*\.$") as error:
        restricted_layout(one, restrict)
    assert said in str(error.value)
