"""Losses of PyTorch modules: frozen parameters, losses that the seed does not determine, and losses that `vmap` cannot run."""

import threading
import time

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from icl.config.validation import ConfigError
from icl.sampling import chains, estimate_llc, llc, module_loss

SETTINGS = {"lr": 1e-3, "nbeta": 50.0, "localization": 5.0, "num_chains": 3, "num_draws": 4, "num_burnin_steps": 3}
GENERATOR = torch.Generator().manual_seed(0)
XS, YS = torch.randn(8, 3, generator=GENERATOR), torch.randn(8, 2, generator=GENERATOR)


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    return network


def run(loss, params, batches=((XS, YS),), **changes):
    return estimate_llc(loss, params, list(batches), **{**SETTINGS, "seed": 2, **changes})


def one_sentence(said):
    return pytest.raises(ConfigError, match=rf"^[^\n]*{said}[^\n]*\.$")


# What a module trains


@pytest.mark.parametrize("vectorize", [True, False])
def test_frozen_parameters_stay_in_the_loss_as_they_are(model, vectorize):
    """If one layer of a module is frozen, the chains equal those of the same module restricted to the other layer."""
    loss, params = module_loss(model, functional.mse_loss)
    restricted = run(loss, params, restrict=["2.*"], vectorize=vectorize)
    model[0].requires_grad_(False)
    loss, params = module_loss(model, functional.mse_loss)
    assert set(params) == {"2.weight", "2.bias"}
    frozen = run(loss, params, vectorize=vectorize)
    assert frozen.num_params == 10
    torch.testing.assert_close(frozen.loss_trace, restricted.loss_trace)
    assert frozen.init_loss == pytest.approx(functional.mse_loss(model(XS), YS).item())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]


def test_a_frozen_parameter_is_the_one_of_the_call(model):
    model[0].requires_grad_(False)
    loss, params = module_loss(model, functional.mse_loss)
    before = loss(params, (XS, YS))
    with torch.no_grad():
        model[0].weight += 1
    assert torch.equal(loss(params, (XS, YS)), before)


def test_parameters_of_a_call_replace_tied_and_nested_ones_and_do_not_stay(model):
    """The loss and its gradient are those of `functional_call`."""
    model.add_module("3", nn.Linear(2, 4))
    model.add_module("4", nn.Linear(4, 2))
    model[4].weight = model[2].weight
    loss, params = module_loss(model, functional.mse_loss)
    assert "4.weight" not in params
    moved = {name: (tensor + 1).requires_grad_() for name, tensor in params.items()}
    values = loss(moved, (XS, YS)), functional.mse_loss(functional_call(model, moved, (XS,)), YS)
    assert torch.equal(*values)
    for grads in zip(*(torch.autograd.grad(value, list(moved.values())) for value in values), strict=True):
        torch.testing.assert_close(*grads)
    kept = {name: tensor for name, tensor in params.items() if name != "0.weight"}
    assert torch.equal(loss(kept, (XS, YS)), functional.mse_loss(model(XS), YS))


def test_a_module_with_nothing_to_train_is_refused(model):
    with one_sentence("no parameter with `requires_grad=True`"):
        module_loss(model.requires_grad_(False), functional.mse_loss)
    with one_sentence("no parameter with `requires_grad=True`"):
        module_loss(nn.Tanh(), functional.mse_loss)


# What it takes


@pytest.mark.parametrize("arguments", [(dict, functional.mse_loss), (nn.Linear(3, 2), "mse")])
def test_what_is_no_module_or_no_criterion_is_refused(arguments, as_users_run):
    with one_sentence("`module_loss` takes a module and a function"):
        module_loss(*arguments)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (XS, "got Tensor"),
        (XS[:2], "got Tensor"),  # would come apart as two rows
        ((XS,), "got tuple of 1"),
        ([XS, XS, YS], "got list of 3"),
        ("text", "got str"),
    ],
)
def test_a_batch_that_is_no_pair_is_refused(model, batch, said, vectorize):
    loss, params = module_loss(model, functional.mse_loss)
    with one_sentence(said):
        run(loss, params, [batch], vectorize=vectorize)


def test_pairs_of_several_inputs_and_without_targets_are_taken(model):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, first, second):
            return self.model(first + second)

    loss, params = module_loss(Sum(), lambda outputs, targets: (outputs - YS).square().mean())
    both = run(loss, params, [((XS / 2, XS / 2), None)])
    assert both.init_loss == pytest.approx(functional.mse_loss(model(XS), YS).item())


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_dict_gives_the_arguments_of_the_model_by_name(model, vectorize):
    """Models of Hugging Face's `transformers` take such batches, and return their loss."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *, inputs, labels=None):
            return {"loss": functional.mse_loss(self.model(inputs), labels)}

    loss, params = module_loss(WithLoss(), lambda output, batch: output["loss"])
    named = run(loss, params, [{"inputs": XS, "labels": YS}], vectorize=vectorize)
    loss, params = module_loss(model, functional.mse_loss)
    plain = run(loss, params, [(XS, YS)], vectorize=vectorize)
    torch.testing.assert_close(named.loss_trace, plain.loss_trace)


# Losses and parameters that cannot be sampled, or only with care


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_loss_that_does_not_depend_on_the_parameters_is_refused(model, vectorize):
    params = module_loss(model, functional.mse_loss)[1]
    bound = [
        lambda params, batch: batch[0].square().mean(),
        lambda params, batch: functional.mse_loss(model.requires_grad_(False)(batch[0]), batch[1]),
        lambda params, batch: params["0.weight"].detach().square().mean(),
    ]
    for loss in bound:
        with one_sentence("does not depend on the parameters that may move"):
            run(loss, params, vectorize=vectorize)
    with one_sentence("does not depend on the parameters that may move"):
        run(lambda params, batch: params["0.weight"].square().mean(), params, restrict=["2.*"], vectorize=vectorize)


@pytest.mark.parametrize("kernel", ["sgld", "rmsprop", "baoab"])
@pytest.mark.parametrize("restrict", [None, ["2.*"]])
@pytest.mark.parametrize("vectorize", [True, False])
def test_parameters_of_mixed_types_keep_their_types(vectorize, restrict, kernel):
    """Each layer computes in its own type. The chains equal those of the same model in float64, up to the rounding of float32."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2).double())

    def loss(params, batch):
        hidden = functional.linear(batch[0].to(params["0.weight"].dtype), params["0.weight"], params["0.bias"]).tanh()
        outputs = functional.linear(hidden.double(), params["2.weight"], params["2.bias"])
        return functional.mse_loss(outputs, batch[1].double())

    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mixed = run(loss, params, vectorize=vectorize, restrict=restrict, kernel=kernel)
    wide = {name: tensor.double() for name, tensor in params.items()}
    double = run(loss, wide, vectorize=vectorize, restrict=restrict, kernel=kernel)
    torch.testing.assert_close(mixed.loss_trace, double.loss_trace, rtol=1e-5, atol=0)
    assert not torch.equal(mixed.loss_trace, double.loss_trace)


def test_many_parameters_run_one_after_another_on_a_cpu_with_the_same_noise(model, monkeypatch):
    """Above some number of parameters, plain operations are faster than the batched operations of `vmap`."""
    loss, params = module_loss(model, functional.mse_loss)
    sizes = []

    def watching(params, batch):
        sizes.append(torch._C._functorch.is_batchedtensor(params["0.weight"]))
        return loss(params, batch)

    mapped = run(watching, params)
    assert any(sizes)
    sizes.clear()
    monkeypatch.setattr(llc, "LOOP_SIZE", 10)
    looped = run(watching, params)
    assert not any(sizes)
    torch.testing.assert_close(looped.loss_trace, mapped.loss_trace)


class Remembering(nn.Module):
    """A module that keeps a value of its own between two operations, as many modules do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, xs):
        """Return the outputs."""
        self.hidden = self.first(xs).tanh()
        time.sleep(1e-3)  # meanwhile another thread calls the module
        return self.last(self.hidden)


@pytest.mark.parametrize("large", [10, 2**16])
def test_chains_in_threads_each_call_their_own_copy_of_the_module(monkeypatch, large):
    """Also the noise of the chains is the same, whether one thread makes it or several."""
    monkeypatch.setattr(llc, "LOOP_SIZE", 10)
    monkeypatch.setattr(chains, "_LARGE", large)
    before, traces = torch.get_num_threads(), []
    model, threads = Remembering().double(), set()

    def criterion(outputs, targets):
        threads.add(threading.get_ident())
        return functional.mse_loss(outputs, targets)

    loss, params = module_loss(model, criterion)
    for num_threads in (1, 3):
        threads.clear()
        try:
            torch.set_num_threads(num_threads)
            traces.append(run(loss, params, [(XS.double(), YS.double())]).loss_trace)
        finally:
            torch.set_num_threads(before)
    assert len(threads) > 1
    torch.testing.assert_close(*traces)
    assert not hasattr(model, "hidden")


# What the seed fixes


def dropping(params, batch):
    return functional.mse_loss(functional.dropout(batch[0], 0.5, training=True) @ params["w"], batch[1])


def seeding(params, batch):
    """Seed the global generator, which also changes it."""
    torch.manual_seed(0)
    return dropping(params, batch)


def own(params, batch):
    """Draw from a new generator that is seeded from the argument."""
    noise = torch.randn(XS.shape, generator=torch.Generator().manual_seed(len(batch[0])))
    return functional.mse_loss((batch[0] + noise) @ params["w"], batch[1])


START = {"w": torch.zeros(3, 2)}


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_loss_that_draws_from_the_global_generator_is_refused_and_moves_it_not(vectorize):
    state = torch.get_rng_state()
    with one_sentence("draws random numbers.*evaluation mode"):
        run(dropping, START, vectorize=vectorize)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_sets_the_global_generator_is_refused_and_it_is_put_back():
    state = torch.get_rng_state()
    with one_sentence("draws random numbers"):
        run(seeding, START, vectorize=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_draws_only_late_is_refused_too():
    calls = []

    def late(params, batch):
        calls.append(0)
        return dropping(params, batch) if len(calls) > 20 else (params["w"] - 1).square().mean()

    with one_sentence("draws random numbers"):
        run(late, START, vectorize=False)
    assert len(calls) == 21


def test_a_loss_that_draws_and_then_fails_leaves_the_generator_as_it_was():
    def failing(params, batch):
        torch.randn(3)
        raise KeyError("its own")

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="its own"):
        run(failing, START, vectorize=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_with_a_generator_of_its_own_is_taken_one_chain_after_another():
    first, again = (run(own, START, vectorize=False) for _ in range(2))
    assert torch.equal(first.loss_trace, again.loss_trace)


def test_dropout_in_training_mode_is_off_in_the_loss_of_a_module(model):
    dropping = nn.Sequential(*model, nn.Dropout(0.5)).train()
    plain, dropped = (run(*module_loss(network, functional.mse_loss)) for network in (model, dropping))
    assert torch.equal(plain.loss_trace, dropped.loss_trace)
    assert dropping.training


# What vmap can run


def reading(params, batch):
    return params["w"].square().sum() * (1.0 if params["w"].sum().item() > 0 else 2.0)


def branching(params, batch):
    return params["w"].square().sum() if params["w"].sum() > 0 else params["w"].abs().sum()


@pytest.mark.parametrize("loss", [reading, branching])
def test_a_loss_that_vmap_cannot_run_is_one_sentence_that_names_the_way_out(loss):
    with one_sentence("`vectorize=False`"):
        run(loss, START)
    assert run(loss, START, vectorize=False).loss_trace.isfinite().all()


def test_errors_of_the_loss_itself_are_left_as_they_are():
    def broken(params, batch):
        return (batch[0] @ batch[0] @ params["w"]).mean()

    with pytest.raises(RuntimeError, match=r"size|shape") as error:
        run(broken, START)
    assert not isinstance(error.value, ConfigError)
