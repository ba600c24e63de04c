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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.model.decoding_step import (
    Inputs,
    OneLayerCache,
    Outline,
    Step,
    UnfitError,
    load_step,
)
from bitlab_hf.model.tree import quantized_layers

logger = logging.getLogger("bitlab")
# Of a layer's output, relative to its norm: rounding of 16-bit values, and codes that it flips.
_TOLERANCE = 0.05
# The cache is read up to a multiple of this.
_GRAIN = 64


def compile_decoding(model: PreTrainedModel) -> int:
    """Compiles the decoding steps of a deployed model on the CPU, where `generate` is given
    ``cache_implementation="static"``; everything else runs as before.

    The first step of one token compiles, or loads what an earlier process compiled. Batches and
    padding are compiled for as they come; any length of the cache is served by one library.

    Args:
        model: A deployed causal language model, on the CPU, with sdpa attention.

    Returns:
        The number of layers that will be compiled; what turns out not to fit is logged, and runs
        as before.

    Raises:
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
    shared = _Shared(model.config)
    for module, index in layers:
        if not isinstance(module.forward, _Decoder):
            module.forward = _Decoder(module, index, shared)
    return len(layers)


def _layer_index(module: nn.Module) -> int | None:
    """Returns the layer's place in the cache; None unless there is one."""
    indices = {getattr(one, "layer_idx", None) for one in module.modules()} - {None}
    return indices.pop() if len(indices) == 1 else None


class _Shared:
    """What the layers of a model share: its configuration, the steps, and the mask of a token."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.steps: dict[Any, Step | UnfitError] = {}
        self.said: set[str] = set()
        self._mask: Tensor | None = None
        self._length = 0
        self._cut: Tensor | None = None

    def cut(self, mask: Tensor, held: StaticLayer) -> Tensor:
        """Returns the part of a mask [..., cache's length] up to the token, rounded up: what is
        beyond is not attended to, so it is not read either. All layers of a token have one mask.
        """
        length = int(held.cumulative_length) + 1
        if mask is not self._mask or length != self._length or self._cut is None:
            self._mask, self._length = mask, length
            self._cut = mask[..., : -(-length // _GRAIN) * _GRAIN]
        return self._cut


@dataclass
class _Ready:
    """A layer's step with its weights, until the next prompt."""

    step: Step
    weights: list[Tensor]
    outline: Outline


class _Decoder:
    """A decoder layer's forward, compiled where it is a step of one token."""

    def __init__(self, module: nn.Module, index: int, shared: _Shared) -> None:
        self._module, self._index, self._shared = module, index, shared
        self._own: Callable[..., Any] = module.forward
        self._ready: _Ready | None = None
        self._is_checked = self._is_unfit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied module has the forward of its class, not this one's.
        return self._own.__func__.__get__(copy.deepcopy(self._module, memo))  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = None if self._is_unfit else self._held(args, kwargs)
        if held is None:
            # A prompt: adapters may come, and weights be exchanged, between two of them.
            self._ready = None
            return self._own(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        inputs.mask = self._shared.cut(inputs.mask, held)
        ready = self._ready
        if ready is None or not ready.outline.are_like(inputs):
            prepared = self._prepare(inputs, held)
            if prepared is None:
                return self._own(*args, **kwargs)
            ready = self._ready = prepared
        if not self._is_checked:
            return self._check(ready, inputs, held, args, kwargs)
        return ready.step(inputs, held, ready.weights)

    def _held(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StaticLayer | None:
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
        held = cache.layers[self._index]
        fits = type(held) is StaticLayer and held.is_initialized
        return held if fits and mask.shape[-1] == held.max_cache_len else None

    def _prepare(self, inputs: Inputs, held: StaticLayer) -> _Ready | None:
        shared = self._shared
        try:
            key, weights = inputs.key(self._module, held, shared.config)
            step = shared.steps.get(key)
            if step is None:
                step = load_step(key, self._module, self._own, inputs, held)
                shared.steps[key] = step
        except UnfitError as error:
            step = shared.steps[key] = error
        if isinstance(step, UnfitError):
            self._leave(str(step))
            return None
        return _Ready(step, weights, inputs.outline())

    def _leave(self, reason: str) -> None:
        self._is_unfit = True
        if reason not in self._shared.said:
            self._shared.said.add(reason)
            kind = type(self._module).__name__
            logger.warning("bitlab: layer %d (%s) is not compiled: %s", self._index, kind, reason)

    def _check(
        self,
        ready: _Ready,
        inputs: Inputs,
        held: StaticLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Computes a step in both ways; returns the compiled one's output if they agree."""
        before = copy.copy(held)
        before.keys, before.values = held.keys.clone(), held.values.clone()
        before.cumulative_length = held.cumulative_length.clone()
        wanted = self._own(*args, **{**kwargs, "past_key_values": OneLayerCache(before)})
        got = None
        if isinstance(wanted, Tensor):
            got = ready.step(inputs, held, ready.weights)
            off = torch.linalg.vector_norm(got.float() - wanted.float())
            if off <= _TOLERANCE * torch.linalg.vector_norm(wanted.float()):
                self._is_checked = True
                return got
        self._leave("its compiled step differs" if got is not None else "it returns several values")
        held.keys.copy_(before.keys)
        held.values.copy_(before.values)
        held.cumulative_length.copy_(before.cumulative_length)
        return wanted
