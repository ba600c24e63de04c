"""Decoding on a CPU with compiled layers: `compile_decoding`.

A small model's token is mostly Python. Here each decoder layer's step of one token, with a static
cache, becomes one call of C++ that inductor made ahead of time: norms, rotary embedding, cache and
attention fused, the ternary layers called directly (`bitcore.kernels.inductor`).

Layers that differ in nothing but their weights share one library, whose weights are inputs. It is
kept in the user's cache (`bitcore.user_cache`), so that only the first process compiles, and only
one layer. Compiling the whole model instead was rejected: torch.compile traces it in every process
anew, which takes ten seconds for 30 layers, and minutes the first time.

The first step of each layer is computed twice, and a layer whose compiled step differs from its own
forward by more than rounding is not compiled.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.model.decoding_inputs import FittedStep, Inputs, Run, Surroundings, UnfitError
from bitlab_hf.model.decoding_step import OneLayerCache, load_step
from bitlab_hf.model.tree import quantized_layers

logger = logging.getLogger("bitlab")
# Of a layer's output, relative to its norm: rounding of 16-bit values, and codes that it flips.
_TOLERANCE = 0.05


def compile_decoding(model: PreTrainedModel, exact: bool = True) -> int:
    """Compiles the decoding steps of a deployed model on the CPU, where `generate` is given
    ``cache_implementation="static"``; everything else runs as before.

    The first step of one token compiles, or loads what an earlier process compiled; any length of
    the cache is served by one library. It can be called again, to change ``exact``.

    Args:
        model: A deployed causal language model, on the CPU, with sdpa attention.
        exact: Whether a model with RMS norms is to have the bits that it has without this and
            with a dynamic cache; steps with padding are not compiled then. Else attention and
            sums are fused, which is quicker the longer the text is, and rounds differently.

    Returns:
        The number of layers that will be compiled; what turns out not to fit is logged, and runs
        as before.

    Raises:
        BackendError: torch is older than 2.10.
        LifecycleError: The model is not deployed, or not on the CPU.
        ArgumentError: It has another attention than sdpa, or no decoder layers with a static cache.
    """
    found = quantized_layers(model)
    if not found or not all(one.module.is_deployed for one in found):
        raise LifecycleError(
            "compile_decoding: the model must be deployed, got layers that are not\n"
            "Call deploy(model), or load a deployed checkpoint."
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise LifecycleError(
            f"compile_decoding: the model must be on the CPU, got {sorted(devices)}\n"
            "On a GPU transformers itself compiles with a static cache."
        )
    attention = model.config._attn_implementation
    if attention != "sdpa":
        raise ArgumentError(
            f"compile_decoding: attn_implementation must be 'sdpa', got {attention!r}"
        )
    layers = [
        (module, index)
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and (index := _layer_index(module)) is not None
    ]
    if not layers or not getattr(model, "_can_compile_fullgraph", False):
        raise ArgumentError(
            "compile_decoding: the model must have decoder layers with a static cache, got "
            f"{type(model).__name__}"
        )
    shared = _Shared(Surroundings(model.config, exact))
    for module, index in layers:
        own = module.forward
        own = own.own if isinstance(own, _Decoder) else own
        module.forward = _Decoder(module, own, index, shared)
    return len(layers)


def _layer_index(module: nn.Module) -> int | None:
    """Returns the layer's place in the cache; None unless there is one."""
    indices = {getattr(one, "layer_idx", None) for one in module.modules()} - {None}
    return indices.pop() if len(indices) == 1 else None


class _Shared:
    """What the layers of a model share: their surroundings, the steps, and the token at hand."""

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.steps: dict[str, Run | UnfitError] = {}
        self.token: _Token | None = None
        self.said: set[str] = set()


class _Token:
    """What all layers are given for one token; each has its own hidden states and weights.

    Args:
        index: The first layer's place.
        kwargs: What it was given, beside its hidden states.
        inputs: The same, taken apart.
    """

    def __init__(self, index: int, kwargs: dict[str, Any], inputs: Inputs) -> None:
        self._last, self._kwargs, self.inputs = index, kwargs, inputs

    def serves(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tells whether a layer is given the very same, for the same token: tensors of the next
        one may be these, written to.
        """
        mine = self._kwargs
        if (
            index > self._last
            and len(args) == 1
            and mine.keys() == kwargs.keys()
            and all(map(operator.is_, mine.values(), kwargs.values()))
        ):
            self._last = index
            return True
        return False


class _Decoder:
    """A decoder layer's forward, compiled where it is a step of one token."""

    def __init__(
        self, module: nn.Module, own: Callable[..., Any], index: int, shared: _Shared
    ) -> None:
        self.own = own
        self._module, self._index, self._shared = module, index, shared
        # A step, and what it was found for; and whether that still holds: until the next prompt.
        self._step: FittedStep | None = None
        self._is_ready = self._is_checked = self._is_unfit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied layer is not compiled.
        return copy.deepcopy(self.own, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = self._shared.token
        if self._is_ready and token is not None and token.serves(self._index, args, kwargs):
            # Thousands of times a second: what a token's first layer found out is not asked again.
            held = kwargs["past_key_values"].layers[self._index]
            if type(held) is StaticLayer and self._step is not None:
                return self._step(args[0], token.inputs, held)
        return self._first(args, kwargs)

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of a token's first layer, and of any that is not ready."""
        held = None if self._is_unfit else self._held(args, kwargs)
        if held is None:
            # A prompt: adapters may come, and weights be exchanged, between two of them.
            self._is_ready, self._shared.token = False, None
            return self.own(*args, **kwargs)
        exact = self._shared.surroundings.exact
        inputs = Inputs(args[1:], kwargs, int(held.cumulative_length) + 1, exact)
        if exact and not inputs.sees_all():
            return self.own(*args, **kwargs)
        step = self._step
        if step is None or not step.fits(self._module, args[0], inputs, self._is_ready):
            self._is_ready, self._step = False, self._find(args[0], inputs, held)
            if self._step is None:
                return self.own(*args, **kwargs)
            step = self._step
        if not self._is_checked:
            return self._check(step, inputs, held, args, kwargs)
        self._is_ready = True
        self._shared.token = _Token(self._index, kwargs, inputs)
        return step(args[0], inputs, held)

    def _held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the layer's cache if this is a step of one token that can be compiled."""
        cache, hidden = kwargs.get("past_key_values"), args[0] if args else None
        mask = kwargs.get("attention_mask")
        if (
            type(cache) is not StaticCache
            or cache.offloading
            or not isinstance(hidden, Tensor)
            or hidden.dim() != 3
            or hidden.shape[1] != 1
            or not isinstance(mask, Tensor)
            or mask.dtype is not torch.bool
            or self._module.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return None
        held: Any = cache.layers[self._index]
        fits = type(held) is StaticLayer and held.is_initialized
        return held if fits and mask.shape[-1] == held.max_cache_len else None

    def _find(self, hidden: Tensor, inputs: Inputs, held: Any) -> FittedStep | None:
        shared = self._shared
        try:
            fitted = FittedStep(self._module, hidden, inputs)
            key = fitted.describe(self._module, inputs, held, shared.surroundings)
            found = shared.steps.get(key)
            if found is None:
                try:
                    found = load_step(
                        key, self._module, self.own, hidden, inputs, held, shared.surroundings
                    )
                except UnfitError as error:
                    found = error
                shared.steps[key] = found
            if isinstance(found, UnfitError):
                raise found
        except UnfitError as error:
            self._leave(str(error))
            return None
        fitted.run = found
        return fitted

    def _leave(self, reason: str) -> None:
        self._is_unfit = True
        if reason not in self._shared.said:
            self._shared.said.add(reason)
            kind = type(self._module).__name__
            logger.warning("bitlab: layer %d (%s) is not compiled: %s", self._index, kind, reason)

    def _check(
        self,
        step: FittedStep,
        inputs: Inputs,
        held: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Computes a step in both ways; returns the compiled one's output if they agree."""
        before = copy.copy(held)
        before.keys, before.values = held.keys.clone(), held.values.clone()
        before.cumulative_length = held.cumulative_length.clone()
        wanted = self.own(*args, **{**kwargs, "past_key_values": OneLayerCache(before)})
        got = None
        if isinstance(wanted, Tensor):
            got = step(args[0], inputs, held)
            off = torch.linalg.vector_norm(got.float() - wanted.float())
            if off <= _TOLERANCE * torch.linalg.vector_norm(wanted.float()):
                self._is_checked = True
                return got
        self._leave("its compiled step differs" if got is not None else "it returns several values")
        held.keys.copy_(before.keys)
        held.values.copy_(before.values)
        held.cumulative_length.copy_(before.cumulative_length)
        return wanted
