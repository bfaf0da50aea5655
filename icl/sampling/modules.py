"""The loss of a PyTorch module and a criterion, as a function of the module's parameters."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from icl.config.validation import ConfigError
from icl.model.stacked import Params
from icl.sampling.batches import Batch
from icl.sampling.target import describe


def module_loss(model: nn.Module, criterion: Callable[[Tensor, Any], Tensor]) -> tuple["ModuleLoss", Params]:
    """Return the loss function of a module and a criterion, and the module's parameters.

    A batch may be a pair (inputs, targets). The loss is then `criterion(model(inputs), targets)`, or
    `criterion(model(*inputs), targets)` if inputs is a tuple. A batch may also be a dict of arguments, as for models of Hugging
    Face's `transformers`. The loss is then `criterion(model(**batch), batch)`. The loss calls a copy of the model in evaluation
    mode, and never the caller's model. On a CPU, several threads may call `criterion` at once. Parameters with
    `requires_grad=False` are not sampled: they keep their current values.

    Example:
        ```python
        loss, params = module_loss(model, torch.nn.functional.mse_loss)
        loss, params = module_loss(language_model, lambda output, batch: output.loss)  # batches have "input_ids", "labels"
        ```

    Raises:
        ConfigError: If the arguments are not a module and a function, or the module has no parameter to sample. The returned loss function
            raises a `ConfigError` too, if a batch is neither a pair nor a dict.
    """
    if not isinstance(model, nn.Module) or not callable(criterion):
        raise ConfigError(
            f"`module_loss` takes a module and a function of (outputs, targets), got {describe(model)} and "
            f"{describe(criterion)}. For any other loss, write `loss(params, batch)` yourself."
        )
    params = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not params:
        raise ConfigError(
            "The module has no parameter with `requires_grad=True`, so there is nothing to sample. Call "
            "`model.requires_grad_()`, or set it for the parameters that chains should move."
        )
    return ModuleLoss(copy.deepcopy(model).eval().requires_grad_(False), criterion), params


class ModuleLoss:
    """The loss that `module_loss` returns. Several threads may call it at once, because each thread calls its own copy of the module.

    The copies share the tensors of the module's parameters and buffers, so they need hardly any memory.
    """

    def __init__(self, model: nn.Module, criterion: Callable[[Tensor, Any], Tensor]) -> None:
        self.model, self.criterion, self._threads = model, criterion, threading.local()

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the loss of the module with these parameters on a batch."""
        if isinstance(batch, Mapping):
            return self.criterion(self._call(params, (), dict(batch)), batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            raise ConfigError(
                f"The loss of a module takes batches (inputs, targets) or dicts of arguments, got {got}. Pass pairs: "
                "((x1, x2), targets) for several inputs, (inputs, None) without targets. Or write `loss(params, batch)` yourself."
            )
        inputs, targets = batch
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return self.criterion(self._call(params, inputs), targets)

    @property
    def _call(self) -> Callable[..., Any]:
        """The function that calls this thread's copy of the module."""
        if not hasattr(self._threads, "call"):
            shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
            self._threads.call = _with_params(copy.deepcopy(self.model, shared))
        return self._threads.call


def _with_params(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a module with other parameters, as `torch.func.functional_call` does, but without its checks.

    The checks take 0.1 to 0.2 ms a call, which is up to a tenth of the gradient of a small module.
    """
    slots: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                slots.setdefault(tensor, []).append((module._parameters, key))  # tied parameters have several slots
    originals = dict(model.named_parameters())
    names = originals.keys()

    def call(params: Mapping[str, Tensor], inputs: Sequence[Any], arguments: Mapping[str, Any] | None = None) -> Any:
        if not params.keys() <= names:
            return functional_call(
                model, dict(params), tuple(inputs), dict(arguments or {})
            )  # `params` has a name that the module lacks
        try:
            for name, tensor in params.items():
                for parameters, key in slots[originals[name]]:
                    parameters[key] = tensor
            return model(*inputs, **(arguments or {}))
        finally:
            for name in params:
                for parameters, key in slots[originals[name]]:
                    parameters[key] = originals[name]

    return call
