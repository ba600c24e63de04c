"""Which adapters work on a ternary layer, found by a rule: what they read, and whom they call.

An adapter that adds to what its layer computes, or changes what goes in, works on any layer. One
that multiplies with the layer's weight itself does not: a deployed layer has no float weight to
train around, and past a latent layer's own forward its weight is not ternary. So while PEFT builds
an adapter, the weights of deployed layers are sealed: they have a shape, a dtype and a device, and
reading their values raises. Then the adapter is run once, on one token of zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitcore.errors import LifecycleError
from bitlayers.base import BitLayerBase
from bitlayers.embedding import TernaryEmbedding
from bitlayers.int8 import Int8Rows
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.state import LayerState

_FIX = "Use an adapter that needs no weight, such as plain LoRA"


def base_of(module: nn.Module) -> nn.Module:
    """Returns the layer inside any number of adapters."""
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    found: nn.Module = base
    return found


def is_packed(module: nn.Module) -> bool:
    """Tells whether a layer holds codes instead of a float weight."""
    return isinstance(module, Int8Rows) or (isinstance(module, LayerState) and module.is_deployed)


def kind_of(module: nn.Module) -> str:
    """Returns what messages call a layer."""
    if isinstance(module, Int8Rows):
        return "an int8 one"
    return "a deployed one" if is_packed(module) else "a latent one"


def refusal(op: str, name: str, module: nn.Module, requirement: str) -> LifecycleError:
    """Returns the error that names the layer and what works instead."""
    other = ", or adapt the latent model"
    if not is_packed(module):
        other = ""
    elif isinstance(module, Int8Rows):
        other = ', or load the model with head="keep"'
    elif isinstance(module, TernaryEmbedding):
        other = ", or call model.dequantize() first"
    return LifecycleError(f"{op}: {name} must {requirement}, got {kind_of(module)}\n{_FIX}{other}.")


class SealedWeight(Tensor):
    """Stands for the float weight of a packed layer: shape, dtype and device, and no values."""

    error: LifecycleError

    @staticmethod
    def __new__(cls, layer: Any, error: LifecycleError) -> SealedWeight:
        """Makes one for a layer; reading its values raises the error."""
        made: SealedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            layer._weight_shape(),
            dtype=layer._float_dtype(),
            device=layer.qweight.device,
        )
        made.error = error
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SealedWeight({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        given = tree_leaves((args, kwargs))
        raise next(one.error for one in given if isinstance(one, SealedWeight))


@contextmanager
def sealed(op: str, model: nn.Module) -> Iterator[None]:
    """Seals the weights of the packed layers in a model within the block.

    Args:
        op: Who would read them, for the message.
        model: Any module tree.
    """
    held: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in model.named_modules():
        known = hasattr(module, "in_features") or isinstance(module, QuantizedEmbedding)
        if not is_packed(module) or not known or hasattr(type(module), "_bitlab_sealed"):
            continue
        error = refusal(op, plain(name), module, "have a float weight to be read")
        weight = SealedWeight(module, error)
        kind = type(module)
        # A property of the class is asked before anything that the module holds.
        fields = {"weight": property(partial(_given, weight)), "_bitlab_sealed": True}
        held.append((module, kind))
        module.__class__ = type(kind.__name__, (kind,), fields)
    try:
        yield
    finally:
        for module, kind in held:
            module.__class__ = kind


def _given(weight: SealedWeight, _module: nn.Module) -> SealedWeight:
    return weight


@contextmanager
def unwritten(op: str, name: str, base: nn.Module) -> Iterator[None]:
    """Refuses what rewrites a latent weight within the block, and gives the weight back.

    Ternarized again, the weight without what an adapter took out of it is another model.

    Args:
        op: Who might write, for the message.
        name: The layer's name.
        base: The layer.
    """
    if is_packed(base) or not isinstance(base, BitLayerBase):
        yield
        return
    held: Any = base.weight
    before = held.detach().clone()
    yield
    weight: Any = base.weight
    if weight is not held or not torch.equal(weight.detach(), before):
        held.data = before
        base.weight = held
        base.invalidate_cache()
        raise refusal(op, name, base, "be a float layer for an adapter that rewrites its weight")


def plain(name: str) -> str:
    """Returns a module's name without what PEFT puts around it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def try_adapter(op: str, name: str, module: Any, adapter: str) -> None:
    """Runs a new adapter once on one token of zeros, within `sealed`.

    Args:
        op: The adapter's method, for the message.
        name: The layer's name.
        module: What PEFT put around the layer.
        adapter: The adapter's name; it need not be the active one.

    Raises:
        LifecycleError: It read the values of a packed weight, or never called the layer.
    """
    module = _materialized(module)
    base = base_of(module)
    called: list[bool] = []
    hook = base.register_forward_pre_hook(lambda *_: called.append(True))
    active, device = module._active_adapter, _device(base)
    devices = [device] if device.type == "cuda" else []
    # Set past the method, which would thaw and freeze Parameters.
    module._active_adapter = [adapter]
    failed = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            module(_token(base, device))
    except LifecycleError:
        raise
    except Exception:
        # It wants more than zeros: whether it works is PEFT's to tell at the first real batch.
        failed = True
    finally:
        module._active_adapter = active
        hook.remove()
    if not called and not failed:
        raise refusal(op, name, base, "be a float layer, to be multiplied with by the adapter")


def _materialized(module: Any) -> Any:
    """Returns a module whose adapters hold data: PEFT can make them empty, for a loader to fill."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    device = _device(base_of(module))
    module = copy.deepcopy(module)
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                part._parameters[leaf] = nn.Parameter(
                    torch.zeros_like(parameter, device=device), False
                )
    return module


def _device(base: Any) -> torch.device:
    held: Tensor = base.qweight if is_packed(base) else base.weight
    return held.device


def _token(base: Any, device: torch.device) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.zeros(1, 1, dtype=torch.long, device=device)
    return torch.zeros(1, 1, base.in_features, dtype=base.weight.dtype, device=device)
