"""How vLLM's linear layers, output heads and embeddings load and use packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bitcore.across import Group, across, across_int8
from bitcore.norm import rms_norm
from bitlab_vllm.arriving import NORM, Arriving, Stored
from bitlab_vllm.parts import Int8Part, TernaryPart
from bitlab_vllm.scheme import Form
from bitlab_vllm.slices import Slice, output_slices

# The file's empty sentinel, and the weight of a part that stays float, come as `weight`.
_LEAVES = ("qweight", "qweight_scale", "qweight_multiplier", "weight")
_library = torch.library.Library("bitlab_vllm", "DEF")
_library.define(
    "across(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, SymInt rows, str activation,"
    " Tensor? multiplier) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "across_int8(Tensor x, Tensor qweight, Tensor scale, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _group() -> Group:
    processes = get_tp_group().device_group

    def reducing(operation: Any) -> Callable[[Tensor], None]:
        return lambda tensor: torch.distributed.all_reduce(tensor, operation, processes)

    kinds = torch.distributed.ReduceOp
    return Group(reducing(kinds.MAX), reducing(kinds.SUM))


def _across(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
) -> Tensor:
    return across(x, qweight, scale, bias, rows, activation, multiplier, _group())


def _across_int8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return across_int8(x, qweight, scale, bias, _group())


for _device in ("CPU", "CUDA"):
    _library.impl("across", _across, _device)
    _library.impl("across_int8", _across_int8, _device)


@torch.library.register_fake("bitlab_vllm::across", lib=_library)
def _(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("bitlab_vllm::across_int8", lib=_library)
def _(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


class PackedLinearMethod(LinearMethodBase):
    """Multiplies ternary and int8 weights, several stored layers as one where vLLM fuses them.

    What arrives is kept as it is until all of a layer is there, and then cut, joined and packed at
    once: a model is never held as codes.

    Args:
        layers: The stored layers that make up vLLM's, by their names in the checkpoint: how each is
            held.
        norms: The names of those with an RMS norm of their input.
    """

    def __init__(self, layers: dict[str, Form], norms: set[str]) -> None:
        self._layers, self._norms = layers, norms

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers what vLLM's loader fills: empty parameters with a loader of their own."""
        slices = _slices(layer, list(self._layers), output_partition_sizes, input_size)
        arriving = Arriving(
            [
                Stored(part, form, part.name in self._norms)
                for part, form in zip(slices, self._layers.values(), strict=True)
            ],
            torch.get_default_device(),
            params_dtype,
        )
        layer.bitlab_arriving = arriving
        for leaf in _LEAVES:
            layer.register_parameter(leaf, arriving.placeholder(leaf))
        if self._norms:
            layer.rms_norm = nn.Module()
            layer.rms_norm.register_parameter("weight", arriving.placeholder(NORM))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Puts what has arrived in its place."""
        arriving = layer.__dict__.pop("bitlab_arriving", None)
        if arriving is None:
            return
        parts = arriving.parts()
        for leaf in _LEAVES:
            delattr(layer, leaf)
        if self._norms:
            del layer.rms_norm
        layer.bitlab_parts = nn.ModuleList(parts)
        layer.bitlab_across = _is_spread(layer)
        if layer.bitlab_across:
            # Done by the op. Where another layer's result is to be added before, zeros of all
            # processes but one leave the sum right.
            layer.bitlab_reduced = layer.reduce_results
            layer.reduce_results = False

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Runs the layer on x [..., k]."""
        parts = layer.bitlab_parts
        if layer.bitlab_across:
            return self._apply_across(layer, parts[0], x)
        if len(parts) == 1:
            y: Tensor = parts[0](x, bias)
            return y
        sizes = [part.rows for part in parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return torch.cat([part(x, one) for part, one in zip(parts, biases, strict=True)], -1)

    @staticmethod
    def _apply_across(layer: Any, part: TernaryPart | Int8Part, x: Tensor) -> Tensor:
        bias = None if layer.skip_bias_add else layer.bias
        y: Tensor
        if isinstance(part, Int8Part):
            y = torch.ops.bitlab_vllm.across_int8(
                x.reshape(-1, x.shape[-1]), part.qweight, part.scale, bias
            )
        else:
            normed = x
            if part.norm is not None:
                whole = tensor_model_parallel_all_gather(x.contiguous())
                start = layer.tp_rank * x.shape[-1]
                normed = rms_norm(whole, part.norm)[..., start : start + x.shape[-1]].contiguous()
            y = torch.ops.bitlab_vllm.across(
                normed.reshape(-1, x.shape[-1]), part.qweight, part.scale, bias, part.rows,
                part.activation, part.multiplier,
            )  # fmt: skip
        if not layer.bitlab_reduced and layer.tp_rank:
            y = torch.zeros_like(y)
        return y.to(x.dtype).view(*x.shape[:-1], part.rows)


class PackedVocabularyMethod(PackedLinearMethod):
    """Looks rows of an embedding up, and multiplies them as an output head."""

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Looks rows up: ids int [...]; returns [..., K] of the model's dtype."""
        rows: Tensor = layer.bitlab_parts[0].lookup(input_, layer.params_dtype)
        return rows


class TiedHeadMethod(QuantizeMethodBase):
    """Of an output head without tensors of its own: the embedding takes its place."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **extra: Any) -> None:
        """None."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Returns the embedding, whose method multiplies too."""
        return embed_tokens

    def apply(self, layer: nn.Module, *inputs: Any, **extra: Any) -> Tensor:
        """Never called."""
        raise NotImplementedError


def _is_spread(layer: Any) -> bool:
    """Tells whether a layer's inputs are spread over processes."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1


def _slices(layer: Any, names: list[str], sizes: list[int], columns: int) -> list[Slice]:
    """What this process has of each stored layer."""
    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        rows = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        shape = (layer.org_vocab_size, columns)
        return [Slice(names[0], shape, (rows,), (0, columns), sizes[0] - rows[1] + rows[0])]
    rank = getattr(layer, "tp_rank", 0)
    processes = getattr(layer, "tp_size", 1)
    if isinstance(layer, RowParallelLinear):
        width = columns // processes
        rows = (0, sizes[0])
        return [Slice(names[0], (sizes[0], columns), (rows,), (rank * width, (rank + 1) * width))]
    if not hasattr(layer, "output_size_per_partition"):
        rank, processes = 0, 1
    # Heads of keys and values that are fewer than the processes are held by several.
    copies = [1] + [getattr(layer, "num_kv_head_replicas", 1)] * (len(sizes) - 1)
    return output_slices(names, columns, sizes, copies, rank, processes)
