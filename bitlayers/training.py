"""What layers do in training only: learned scales, and quantization of less than full strength."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import estimators, ops
from bitcore.errors import ArgumentError, NonFiniteError
from bitcore.plain import is_watched
from bitlayers.gathered import GatheredWeight
from bitlayers.state import LayerState, Packed


def is_learned(layer: LayerState) -> bool:
    """Tells whether the layer's estimator trains its scale."""
    return estimators.get_estimator(layer.quant_config.weight_quantizer).learned


def make_learned_scale(layer: LayerState) -> None:
    """Gives a latent layer the scale Parameter that its estimator trains, if it does."""
    scale = None
    if is_learned(layer):
        weight = layer.weight
        data = torch.empty(layer.estimated_shape(), dtype=torch.float32, device=weight.device)
        scale = nn.Parameter(data, requires_grad=weight.requires_grad)
    layer.register_parameter("learned_scale", scale)
    reset_learned_scale(layer)


@torch.no_grad()
def reset_learned_scale(layer: LayerState) -> None:
    """Sets the learned scale, if there is one, as its estimator starts it for the weight."""
    scale, config = layer.learned_scale, layer.quant_config
    if scale is None or scale.is_meta or layer.weight.is_meta:
        return
    # As it is before it is brought to two levels.
    step = ops.estimate(
        layer.weight,
        config.weight_quantizer,
        "per_group_float32" if config.group_size else config.granularity,
        config.group_size,
    )[0]
    scale.copy_(step)


def training_scales(layer: LayerState) -> tuple[Tensor | None, ...]:
    """Returns step, scale and multipliers as `bitcore.ops.qat_linear` takes them."""
    config = layer.quant_config
    if config.weight_quantizer == "absmean":
        return None, None
    if layer.learned_scale is not None:
        # FSDP's mixed precision rounds parameters for a forward pass.
        return None, layer.learned_scale.float()
    return ops.estimate(
        layer.weight, config.weight_quantizer, config.granularity, config.group_size
    )


# Elements of a weight that are compared to see whether it was written, a side of a square grid.
_COMPARED = 8


def is_decoding(x: Tensor) -> bool:
    """Tells whether x [..., L, K] is one step of decoding, L = 1: a token of each sequence.

    Only such a step uses what was packed before, since packing costs more there than all else.
    Anything longer is packed for, as in training: no check of a whole weight is quicker than that.
    """
    return (x.dim() > 1 and x.shape[-2] == 1) or torch.compiler.is_compiling()


class Fingerprint:
    """What of a latent weight and its learned scale is compared between two steps of decoding.

    In-place operations raise a tensor's version. What is written through ``.data`` does not, nor
    does another tensor that is put behind the Parameter. Therefore a grid of values is compared
    too. It misses a write through ``.data``, amid decoding, to other elements only, after which
    ``invalidate_cache()`` is needed.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._marks = [(tensor._version, tensor.data_ptr(), tensor.shape) for tensor in tensors]
        # Weakly: the cache must not keep a weight alive that was offloaded.
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._values = [_grid(tensor).clone() for tensor in tensors]

    def matches(self, tensors: list[Tensor]) -> bool:
        """Tells whether these are the same tensors, not written to since."""
        return len(tensors) == len(self._marks) and all(
            held() is tensor
            and mark == (tensor._version, tensor.data_ptr(), tensor.shape)
            and torch.equal(values, _grid(tensor))
            for held, mark, values, tensor in zip(
                self._tensors, self._marks, self._values, tensors, strict=True
            )
        )


def _grid(tensor: Tensor) -> Tensor:
    # Odd steps: what is written to every other row or column is met.
    steps = tuple(slice(None, None, -(-size // _COMPARED) | 1) for size in tensor.shape)
    return tensor.detach()[steps]


def latent_tensors(layer: LayerState) -> list[Tensor] | None:
    """Returns what packed weights depend on; None where a write to it could pass unseen: on a GPU
    it would have to be waited for, a sharded or inference tensor does not tell.
    """
    weight: Tensor = layer.weight
    if not shows_writes(weight):
        return None
    learned: Tensor | None = layer._parameters["learned_scale"]
    return [weight] if learned is None else [weight, learned]


def shows_writes(weight: Tensor) -> bool:
    """Tells whether a `Fingerprint` of a weight can be taken, and will tell that it was written."""
    if is_watched() or weight.is_inference() or weight.device.type != "cpu":
        return False
    return type(weight.data) is Tensor


@torch.no_grad()
def pack(layer: LayerState) -> Packed:
    """Packs a latent weight by the layer's estimator: qweight, its scale, and multipliers."""
    config = layer.quant_config
    if isinstance(layer.weight, GatheredWeight):
        return layer.weight.packed
    step, scale, *multiplier = training_scales(layer)
    if scale is None:
        return ops.pack_weight(layer.weight, config.granularity, config.group_size)
    if step is None:
        step, scale, *multiplier = estimators.learned_scales(scale.detach(), config.granularity)
    given = [one for one in multiplier if one is not None]
    return ops.pack_codes(layer.weight, step), scale, *given


def check_learned_scale(layer: LayerState, name: str) -> None:
    """Checks that a learned scale can be deployed.

    One that training has taken to zero or below is deployed as the forward uses it: as 1e-5, so
    that its weights say next to nothing.

    Args:
        layer: The layer.
        name: What messages call its weight.

    Raises:
        NonFiniteError: The scale holds NaN or infinity.
    """
    scale = layer.learned_scale
    if scale is None or bool(torch.isfinite(scale).all()):
        return
    raise NonFiniteError(
        f"deploy: {name.removesuffix('weight')}learned_scale must be finite, got NaN or infinity; "
        "nothing changed\nTrain with a lower learning rate, or set it anew from the weight with "
        "bitlayers.training.reset_learned_scale(layer)."
    )


def mixed_linear(layer: LayerState, x: Tensor) -> Tensor:
    """The training forward at a quantization strength s below 1.

    ``y = (x + s (x_q s_x - x)) @ (W + s (w_q s_w - W)).T + bias`` in the output's dtype, gradients
    straight through both differences (through a learned scale by `bitcore.estimators`).

    Source: "Fine-tuning LLMs to 1.58bit: extreme quantization made easy", Hugging Face blog, 2024.
    """
    strength = layer.quant_strength
    activation, weight = layer.quant_config.activation, layer.weight
    if strength > 0 and layer.learned_scale is not None:
        scale = layer.learned_scale.float()
        quantized = estimators.learned_weight(weight, scale, layer.quant_config.granularity)
        weight = weight + strength * (quantized - weight)
    elif strength > 0:
        with torch.no_grad():
            qweight, scale, *multiplier = pack(layer)
            rows = layer.out_features
            quantized = ops.unpack_weight(qweight, scale, rows, torch.float32, *multiplier)
            difference = strength * (quantized - weight)
        weight = weight + difference
    return mixed_product(x, weight, layer.bias, activation, strength)


def mixed_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, strength: float
) -> Tensor:
    """Returns x, quantized as far as strength says, times a weight [N, K] that is so already."""
    dtype = ops.output_dtype(x)
    if strength > 0 and activation != "float":
        with torch.no_grad():
            codes, scale = torch.ops.bitlab.quantize_activation(x, activation == "int8_per_tensor")
            difference = strength * (codes.float() * scale - x)
        x = x + difference
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias)


def set_quant_strength(model: nn.Module, value: float) -> None:
    """Sets how far the training forward of every latent quantized layer is quantized.

    Only training mode reads it: evaluation and deployment always quantize fully.

    Args:
        model: Any module tree.
        value: From 0 (not at all) to 1 (fully, the default).

    Raises:
        ArgumentError: value is no number from 0 to 1, or the model has no quantized layer.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ArgumentError(
            f"set_quant_strength: value must be a number from 0 to 1, got {value!r}"
        )
    # Layers, and experts, which are no layers of one matrix.
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "quant_strength")]
    if not layers:
        raise ArgumentError("set_quant_strength: model must hold quantized layers, got none")
    for layer in layers:
        layer.quant_strength = float(value)
