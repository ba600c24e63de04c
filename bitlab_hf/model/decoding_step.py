"""One decoder layer's step of one token as a library: exported, compiled, kept, called.

See `bitlab_hf.model.decoding`. The library takes everything as an input: what the model gives the
layer, the cache's tensors, which it writes to, and the layer's weights.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from bitcore.errors import BackendError
from bitcore.kernels.inductor import inductor_options, sum_as_eager
from bitcore.user_cache import cache_folder
from bitlab_hf.model.decoding_attention import EXACT, FUSED, attend_as_eager, attend_fused
from bitlab_hf.model.decoding_inputs import Inputs, Run, Surroundings, UnfitError, weights_of

# Of the cache and of the mask while a step is exported; both may be any in the library.
_EXAMPLE_LENGTH, _EXAMPLE_CUT = 320, 192

AttentionInterface.register(EXACT, attend_as_eager)
AttentionInterface.register(FUSED, attend_fused)


class OneLayerCache(Cache):
    """A cache of one layer, whatever place the layer says that it has."""

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__(layers=[layer])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes to the layer; see transformers."""
        layer: Any = self.layers[0]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Returns how many tokens the layer holds."""
        layer: Any = self.layers[0]
        return layer.get_seq_length()


def _load(library: Path) -> Run:
    run: Run = torch._inductor.aoti_load_package(str(library)).loader.run
    return run


def load_step(
    key: str,
    module: nn.Module,
    forward: Callable[..., Any],
    hidden: Tensor,
    inputs: Inputs,
    held: Any,
    surroundings: Surroundings,
) -> Run:
    """Loads a layer's step from the user's cache, or compiles and keeps it.

    Args:
        key: What it depends on, as `FittedStep.describe` has it.
        module: The layer.
        forward: Its own forward.
        hidden: The hidden states of a token.
        inputs: Its other inputs.
        held: The layer's cache.
        surroundings: What else it depends on.

    Raises:
        UnfitError: The layer cannot be exported.
        BackendError: It cannot be compiled here.
    """
    folder = cache_folder("decoding")
    library = None if folder is None else folder / f"{key}.pt2"
    if library is not None and library.is_file():
        try:
            return _load(library)
        except Exception:
            # Whatever a damaged file makes the loader raise.
            library.unlink(missing_ok=True)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder) as draft:
        # torch's own, of what it calls itself.
        warnings.simplefilter("ignore", FutureWarning)
        exported = _export(module, forward, hidden, inputs, held, surroundings.exact)
        try:
            made = torch._inductor.aoti_compile_and_package(
                exported, package_path=f"{draft}/step.pt2", inductor_configs=inductor_options()
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(
                f"compile_decoding: a layer must compile, got: {reason[0]}\n"
                "A C++ compiler is needed: install g++ or clang++, or name one in CXX."
            ) from error
        if library is None:
            return _load(Path(made))
        shutil.move(str(made), library)
    return _load(library)


class _Exported(nn.Module):
    """A layer's step as a function of tensors."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], inputs: Inputs) -> None:
        super().__init__()
        # Not as a submodule: its weights are inputs.
        self.__dict__["_layer"], self._inputs = (module, forward), inputs

    def forward(
        self,
        hidden: Tensor,
        tensors: list[Tensor],
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        weights: list[Tensor],
    ) -> Any:
        module, forward = self.__dict__["_layer"]
        held = StaticLayer.__new__(StaticLayer)
        held.keys, held.values, held.cumulative_length = keys, values, length
        held.device, held.dtype, held.is_initialized = keys.device, keys.dtype, True
        held.max_cache_len = keys.shape[2]
        args, kwargs = self._inputs.rebuild(tensors)
        kwargs |= {"attention_mask": mask, "past_key_values": OneLayerCache(held)}
        named = dict(zip(weights_of(module), weights, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(module, named):
            return forward(hidden, *args, **kwargs)


def _export(
    module: nn.Module,
    forward: Callable[..., Any],
    hidden: Tensor,
    inputs: Inputs,
    held: Any,
    exact: bool,
) -> Any:
    keys, values = (
        one.new_zeros((*one.shape[:2], _EXAMPLE_LENGTH, one.shape[3]))
        for one in (held.keys, held.values)
    )
    mask = inputs.mask.new_ones((*inputs.mask.shape[:-1], _EXAMPLE_CUT))
    weights = list(weights_of(module).values())
    length = held.cumulative_length.clone()
    example = (hidden, inputs.tensors, mask, keys, values, length, weights)
    any_length = torch.export.Dim.AUTO
    shapes = (
        None,
        [None] * len(inputs.tensors),
        {mask.dim() - 1: any_length},
        {2: any_length},
        {2: any_length},
        None,
        [None] * len(weights),
    )
    try:
        with torch.no_grad(), _attention(module, EXACT if exact else FUSED):
            exported = torch.export.export(
                _Exported(module, forward, inputs), example, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnfitError(f"torch.export cannot take it: {reason[0]}") from error
    if len(exported.graph_signature.user_outputs) != 1:
        raise UnfitError("it returns several values")
    if exact:
        sum_as_eager(exported.graph)
        exported.graph_module.recompile()
    return exported


@contextmanager
def _attention(module: nn.Module, name: str) -> Iterator[None]:
    """Makes a layer attend as a compiled step does."""
    configs: dict[int, Any] = {
        id(one.config): one.config for one in module.modules() if hasattr(one, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
