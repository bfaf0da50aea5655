"""The chain driver: draws do not depend on how members are grouped, batches follow the documented order, and inputs stay unchanged."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from options import estimate_many, keywords
from torch import nn

from icl.config import ChainsConfig
from icl.config.validation import ConfigError
from icl.sampling import CheckpointId, estimate_llc, module_loss
from icl.sampling.batches import batch_function
from icl.sampling.estimate import estimate as estimate_population
from icl.sampling.target import Target
from icl.sampling.verdict import Evidence

SETTINGS = {
    "lr": 1e-3,
    "nbeta": 50.0,
    "localization": 5.0,
    "num_chains": 3,
    "num_draws": 6,
    "num_burnin_steps": 4,
    "seed": 7,
}


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    return network


def batches(chain, draw):
    generator = torch.Generator().manual_seed(1000 * chain + draw)
    xs = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return xs, torch.randn(5, 2, dtype=torch.float64, generator=generator)


def estimate(model, source=batches, **changes):
    loss, params = module_loss(model, nn.functional.mse_loss)
    return estimate_llc(loss, params, source, **keywords(**{**SETTINGS, **changes}))


def same(one, other, tolerance=1e-10):
    return torch.allclose(one.loss_trace, other.loss_trace, rtol=tolerance, atol=0) and torch.allclose(
        one.burnin_trace, other.burnin_trace, rtol=tolerance, atol=0
    )


def numbers(result):
    """Return the evidence as a dict, without the values that are not set."""
    evidence = {field.name: getattr(result, field.name) for field in dataclasses.fields(Evidence)}
    return {name: value for name, value in evidence.items() if value is not None}


# The same draws


@pytest.mark.parametrize("kernel", ["sgld", "rmsprop", "baoab"])
def test_one_at_a_time_and_in_small_chunks_give_the_draws_of_all_at_once(model, kernel):
    """The draws agree in float64 up to rounding. With memory for one byte, members run one at a time, still by vmap."""
    together = estimate(model, kernel=kernel)
    assert same(together, estimate(model, kernel=kernel, vectorize=False))
    assert same(together, estimate(model, kernel=kernel, memory=1.0))


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(model):
    first, again, other = estimate(model), estimate(model), estimate(model, seed=8)
    assert torch.equal(first.loss_trace, again.loss_trace)
    assert (first.loss_trace != other.loss_trace).all()  # the first draw comes after four moves


def test_a_checkpoint_among_others_is_as_it_would_be_alone(model):
    loss, params = module_loss(model, nn.functional.mse_loss)
    moved = {name: tensor + 0.1 for name, tensor in params.items()}
    together = estimate_many(loss, [params, moved], batches, **SETTINGS)
    alone = estimate_llc(loss, params, batches, **SETTINGS)
    assert same(together[0], alone)
    assert not torch.allclose(together[1].loss_trace, alone.loss_trace)


def test_chains_and_checkpoints_have_noise_of_their_own(model):
    loss, params = module_loss(model, nn.functional.mse_loss)
    twins = estimate_many(loss, [params, params], [batches(0, 0)], **SETTINGS)
    traces = torch.cat([twin.loss_trace for twin in twins])  # one batch for all: only the noise differs
    assert len(set(traces[:, -1].tolist())) == 6


def test_an_injected_gradient_takes_the_place_of_the_default(model):
    from icl.sampling.target import looped_gradient

    loss, _ = module_loss(model, nn.functional.mse_loss)
    assert same(estimate(model), estimate(model, gradient=looped_gradient(loss)))


@pytest.mark.slow
def test_a_checkpoint_under_several_settings_is_as_it_would_be_under_each_alone(model):
    """Each setting sees the same minibatches and noise, whatever the size of the chunks."""
    loss, params = module_loss(model, nn.functional.mse_loss)
    moved = {name: tensor + 0.1 for name, tensor in params.items()}
    corners = [{"lr": 1e-3}, {"lr": 1e-3, "nbeta": 500.0}, {"lr": 1e-4, "localization": 50.0}]
    settings = [ChainsConfig(**{**SETTINGS, **corner}) for corner in corners]
    identities = [CheckpointId(), CheckpointId()]
    for memory in (None, 1e4, 1.0):
        target = Target(loss=loss, batches=batches, trivial_loss=10.0)
        together = estimate_population(target, [params, moved], settings, identities=identities, memory=memory)
        for corner, found in zip(corners, together, strict=True):
            alone = estimate_many(loss, [params, moved], batches, trivial_loss=10.0, **{**SETTINGS, **corner})
            for one, other in zip(found, alone, strict=True):
                assert same(one, other)
                assert one.settings == other.settings
                assert numbers(one) == pytest.approx(numbers(other), rel=1e-8, nan_ok=True)


def test_settings_that_run_together_are_of_one_length(model):
    loss, params = module_loss(model, nn.functional.mse_loss)
    settings = [ChainsConfig(**{**SETTINGS, "num_draws": draws}) for draws in (6, 7)]
    with pytest.raises(ConfigError, match="lr, nbeta and localization only"):
        estimate_population(Target(loss=loss, batches=batches), [params], settings, identities=[CheckpointId()])


# What draws are


def test_draws_follow_burnin_and_thinning(model):
    """Every move of an unthinned run is either burn-in or a draw of the thinned run. The first loss is the checkpoint's."""
    every = estimate(model, num_burnin_steps=0, num_draws=20)
    some = estimate(model, num_burnin_steps=5, num_draws=4, thinning=3)
    assert torch.equal(some.burnin_trace, every.loss_trace[:, :5])
    assert torch.equal(some.loss_trace, every.loss_trace[:, [5, 8, 11, 14]])
    loss, params = module_loss(model, nn.functional.mse_loss)
    expected = [float(loss(params, batches(chain, 0))) for chain in range(3)]
    assert every.loss_trace[:, 0].tolist() == pytest.approx(expected)


def test_burnin_is_in_no_average(model):
    result = estimate(model, num_burnin_steps=10)
    loss, params = module_loss(model, nn.functional.mse_loss)
    before = torch.tensor([[loss(params, batches(chain, 10 + draw)) for draw in range(6)] for chain in range(3)])
    assert result.llc == pytest.approx(50 * float((result.loss_trace - before).mean()), rel=1e-4)
    assert result.mean_loss == pytest.approx(result.init_loss + result.llc / 50)
    assert result.loss_trace.shape == (3, 6)
    assert result.burnin_trace.shape == (3, 10)


def test_a_function_is_asked_for_each_chain_and_move(model):
    asked = set()

    def noting(chain, draw):
        asked.add((chain, draw))
        return batches(chain, draw)

    estimate(model, noting, thinning=2)
    assert asked == {(chain, draw) for chain in range(3) for draw in range(4 + 5 * 2 + 1)}


class Once:
    """An iterable without length or index. Each pass draws from the global generator, as a shuffling loader does."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        order = torch.randperm(len(self.items)).tolist()
        return (self.items[i] for i in order)


def test_an_iterable_is_dealt_in_turn_and_starts_over(model):
    items = [batches(0, i) for i in range(7)]
    by_hand = estimate(model, lambda chain, draw: items[(draw * 3 + chain) % 7])
    assert same(by_hand, estimate(model, items))
    assert same(by_hand, estimate(model, iter(items)))  # seven, and then no more
    assert same(by_hand, estimate(model, iter(items), vectorize=False))


def test_a_shuffling_loader_gives_the_same_however_chains_are_grouped(model):
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*(part.repeat(4, 1) for part in batches(0, 0))), batch_size=5, shuffle=True
    )
    assert same(estimate(model, loader), estimate(model, loader, vectorize=False))
    assert same(
        estimate(model, Once([batches(0, i) for i in range(7)])),
        estimate(model, Once([batches(0, i) for i in range(7)])),
    )


def dealt(batches, *, num_chains, num_draws):
    """Return the batches that each chain gets, in order."""
    source = batch_function(batches, num_chains=num_chains, seed=0)
    rows = [[source(chain, draw) for chain in range(num_chains)] for draw in range(num_draws)]
    return list(zip(*rows, strict=True))


class Again:
    """An iterable without length that can be read repeatedly."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("kind", [list, Again, iter], ids=["list", "iterable", "iterator"])
@pytest.mark.parametrize(("num_chains", "length"), [(8, 16), (6, 4), (4, 4), (3, 7), (1, 5), (5, 1)])
def test_every_chain_meets_every_batch_equally_often(kind, num_chains, length):
    rounds = 12
    chains = dealt(kind(list(range(length))), num_chains=num_chains, num_draws=rounds * length)
    for chain in chains:
        counts = [chain.count(batch) for batch in range(length)]
        assert max(counts) - min(counts) <= rounds / 4
    first = [batch for row in zip(*chains, strict=True) for batch in row][: math.lcm(num_chains, length)]
    assert first == [number % length for number in range(len(first))]  # in turn, until it would repeat itself


def test_a_shuffling_loader_has_a_new_order_in_every_pass():
    loader = torch.utils.data.DataLoader(list(range(12)), batch_size=None, shuffle=True)
    (chain,) = dealt(loader, num_chains=1, num_draws=36)
    passes = [chain[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert len(set(passes)) == 3
    assert dealt(loader, num_chains=1, num_draws=36) == [chain]


def test_numbers_and_arrays_may_be_batches():
    target = torch.tensor([3.0, 5.0])

    def loss(params, batch):
        return (params["w"] - target * batch[0]).square().sum() + batch[1].sum()

    def source(chain, draw):
        return chain + draw, torch.ones(2).numpy()

    run = {**SETTINGS, "num_init_batches": 1}
    one = estimate_llc(loss, {"w": torch.zeros(2)}, source, **run)
    other = estimate_llc(loss, {"w": torch.zeros(2)}, lambda *at: (torch.tensor(sum(at)), torch.ones(2)), **run)
    assert torch.equal(one.loss_trace, other.loss_trace)
    assert len(set(one.loss_trace[:, 0].tolist())) == 3


# What stays as it was


def test_nothing_that_the_caller_lends_is_changed(model):
    model.train()
    before, params = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loader = Once([batches(0, i) for i in range(7)])
    loss, _ = module_loss(model, nn.functional.mse_loss)
    estimate_llc(loss, params, loader, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def moved_entries(restrict, model):
    """Return which elements ever differ from the checkpoint. A loss that looks at its parameters, one chain at a time, records them."""
    criterion = nn.functional.mse_loss
    loss, params = module_loss(model, criterion)
    moved = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in params.items()}

    def watching(seen, batch):
        for name, tensor in seen.items():
            moved[name] |= tensor.detach() != params[name]
        return loss(seen, batch)

    result = estimate_llc(watching, params, batches, **SETTINGS, restrict=restrict, vectorize=False)
    return moved, result


@pytest.mark.parametrize("restrict", [["2.*"], ["0.bias", "2.weight"], "2.bias"])
def test_only_what_is_named_moves(model, restrict):
    moved, result = moved_entries(restrict, model)
    names = (
        {"2.weight", "2.bias"} if restrict == ["2.*"] else {restrict} if isinstance(restrict, str) else set(restrict)
    )
    assert all(mask.all() if name in names else not mask.any() for name, mask in moved.items())
    assert result.num_params == sum(mask.numel() for name, mask in moved.items() if name in names)


def test_only_what_a_mask_selects_moves(model):
    masks = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        for name, p in model.named_parameters()
    }
    masks["0.bias"][:] = False
    moved, result = moved_entries(masks, model)
    assert all(torch.equal(moved[name], masks[name]) for name in masks)
    assert result.num_params == sum(int(mask.sum()) for mask in masks.values())
    together = estimate(model, restrict=masks)
    assert same(together, result)


# Refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nbeta": None}, "`num_samples`"),
        ({"nbeta": -1.0}, "`nbeta` must be positive"),
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": float("nan")}, "`lr` must be positive"),
        ({"localization": -1.0}, "`localization`"),
        ({"num_draws": 1}, "`num_draws`"),
        ({"num_chains": 0}, "`num_chains`"),
        ({"num_init_batches": 0}, "`num_init_batches`"),
        ({"kernel": "hmc"}, "`kernel` must be one of sgld, rmsprop"),
        ({"kernel": "rmsprop", "num_burnin_steps": 0}, "burn-in"),
        ({"kernel": "baoab", "friction": 1.0}, "`friction` must be in [0, 1), got 1.0"),
        ({"friction": -0.5}, "`friction` must be zero or positive"),
        ({"restrict": ["3.*"]}, "none of the parameters 0.weight"),
        ({"restrict": []}, "no parameter free"),
        ({"restrict": {"2.bias": torch.ones(3, dtype=torch.bool)}}, "shape"),
        ({"restrict": {"bias": torch.ones(2, dtype=torch.bool)}}, "`bias`"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(model, changes, said):
    with pytest.raises(ConfigError, match=r"^[^\n]*\.$") as error:
        estimate(model, **changes)
    assert said in str(error.value)


def refused(said, **changes):
    arguments = {"loss": lambda params, batch: params["w"].square().sum(), "params": {"w": torch.zeros(3)}}
    with pytest.raises(ConfigError, match=r"^[^\n]*\.$") as error:
        estimate_llc(**keywords(**{**arguments, "batches": [None], **SETTINGS, **changes}))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", ["1e-3", None, True, float("inf"), torch.ones(2)]),
        ("nbeta", ["10", float("nan"), -1]),
        ("localization", [None, "0", -1.0]),
        ("trivial_loss", [float("nan"), float("inf"), -float("inf"), "2", torch.tensor(float("nan"))]),
        ("num_samples", [2.5, 300.0, "300", 1, True]),
        ("num_init_batches", [0, 2.5, None]),
        ("num_draws", [100.0, 1, "100", None]),
        ("memory", [0, float("nan"), "2G"]),
        ("seed", [-1, 0.5, None]),
    ],
)
def test_a_setting_of_the_wrong_kind_is_one_sentence_with_its_name(name, values, as_users_run):
    for value in values:
        refused(f"`{name}` must be", **{name: value})


def test_numbers_may_come_from_arrays_and_tensors(model, as_users_run):
    plain = estimate(model, num_samples=300, trivial_loss=2.0)
    told = {"lr": torch.tensor(1e-3, dtype=torch.float64), "nbeta": np.float64(50), "localization": 5}
    told |= {"num_chains": np.int64(3), "num_samples": np.int32(300), "trivial_loss": torch.tensor(2.0)}
    other = estimate(model, **told)
    assert same(plain, other, tolerance=0)
    assert plain.settings == other.settings
    assert numbers(plain) == pytest.approx(numbers(other), rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (nn.Linear(3, 2), "got Linear. For a module, `loss, params = module_loss(model, criterion)`"),
        (nn.Sequential(nn.Linear(3, 2)), "got Sequential"),
        ({}, "no parameters to sample"),
        (torch.zeros(3), "dict from names to tensors, got Tensor"),
        ({"w": [0.0]}, "got dict of list"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused_as_parameters(params, said, as_users_run):
    refused(said, params=params)


def test_one_checkpoint_or_none_in_place_of_several_is_refused(model, as_users_run):
    loss, params = module_loss(model, nn.functional.mse_loss)
    for given, said in ((params, "got dict"), (model, "got Sequential"), (3, "got int"), ([], "no parameters")):
        with pytest.raises(ConfigError, match=said):
            estimate_many(loss, given, batches, **SETTINGS)


@pytest.mark.parametrize(
    "loss", [nn.Linear(3, 2), lambda params: params["w"].sum(), 3, None], ids=["module", "one argument", "3", "None"]
)
def test_what_does_not_take_parameters_and_a_batch_is_refused_as_loss(loss, as_users_run):
    refused("`loss` must be a function of (params, batch)", loss=loss)


def test_identities_are_as_many_as_checkpoints():
    refused("`identities` must have one entry per checkpoint (1), got 0", identities=[])


@pytest.mark.parametrize(
    "source",
    [[], iter([]), 3, torch.zeros(2, 3), np.zeros((2, 3)), {"xs": torch.zeros(2, 3)}],
    ids=lambda one: type(one).__name__,
)
def test_batches_that_are_none_are_refused(model, source, as_users_run):
    with pytest.raises(ConfigError, match="`batches`"):
        estimate(model, source)


def test_batches_of_different_shapes_are_refused_together_and_taken_one_at_a_time(model):
    def ragged(chain, draw):
        xs, ys = batches(chain, draw)
        return xs[: 3 + chain], ys[: 3 + chain]

    with pytest.raises(ConfigError, match="vectorize=False"):
        estimate(model, ragged)
    assert estimate(model, ragged, vectorize=False).loss_trace.isfinite().all()


def test_a_loss_that_is_a_matrix_is_refused():
    with pytest.raises(TypeError, match="vector of components"):
        estimate_llc(lambda params, batch: params["w"] ** 2, {"w": torch.ones(2, 2)}, [None], **SETTINGS)


def test_progress_is_told_to_the_end(model):
    told = []
    estimate(model, progress=lambda done, total: told.append((done, total)), memory=1.0)
    assert [done for done, _ in told] == list(range(1, 31))
    assert {total for _, total in told} == {30}
