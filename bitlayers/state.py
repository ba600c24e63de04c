"""LayerState: the fields of a quantized layer that its checks and its training read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitcore import ops
from bitcore.config import BitQuantConfig
from bitcore.errors import LifecycleError
from bitlayers.quantized import QuantizedModule

# The buffers of packed weights; the second only where groups have scales in two levels.
SCALES = ("qweight_scale", "qweight_multiplier")
# What `packed` returns: qweight, its scale, and multipliers where there are any.
Packed = tuple[Tensor, ...]


class LayerState(QuantizedModule):
    """What `bitlayers.base.BitLayerBase` documents as its attributes, and what follows from them.

    Attributes:
        float_dtype: dtype of the float layer that this one stands for; a deployed layer's
            ``weight`` has it.
        casts_input: Whether the model casts the input to ``weight.dtype``. A latent weight can be
            wider than the float one was; the input is cast on to what that was.
        packs_itself: Whether the layer was deployed by a ``_perform_deployment`` that registered
            tensors of its own and returned nothing.
        gathers_packed: Whether FSDP2 gathers a `bitlayers.gathered.PackedShard` packed; None until
            the first gather.
    """

    in_features: int
    out_features: int
    bias: Any
    quant_config: BitQuantConfig
    latent_dtype: torch.dtype
    float_dtype: torch.dtype
    learned_scale: nn.Parameter | None
    quant_strength: float = 1.0
    casts_input: bool = False
    packs_itself: bool = False
    gathers_packed: bool | None = None
    _is_deployed: bool

    @property
    def is_deployed(self) -> bool:
        """Whether the layer has been deployed."""
        return self._is_deployed

    @property
    def use_bias(self) -> bool:
        """Whether the layer has a bias."""
        return self.bias is not None

    def packed(self) -> Packed:
        """Returns ``(qweight, qweight_scale)``, with scales of groups in two levels also
        ``qweight_multiplier``.
        """
        raise NotImplementedError

    def estimated_shape(self) -> tuple[int, ...]:
        """Returns the shape of the scales that are estimated or learned: [1], [N] or [N, K / G]."""
        config = self.quant_config
        if config.group_size is not None:
            return self.out_features, self.in_features // config.group_size
        return (1,) if config.weight_granularity == "per_tensor" else (self.out_features,)

    def packed_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of each packed tensor that the configuration asks for, by name,
        in the order of `packed`.
        """
        estimated = self.estimated_shape()
        qweight = torch.uint8, ((self.out_features + 3) // 4, self.in_features)
        if self.quant_config.granularity != "per_group":
            return {"qweight": qweight, "qweight_scale": (torch.float32, estimated)}
        return {
            "qweight": qweight,
            "qweight_scale": (torch.float32, estimated[:1]),
            "qweight_multiplier": (torch.uint8, estimated),
        }

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns codes times scale, [N, K]: exactly what the deployed layer multiplies with.

        Raises:
            LifecycleError: The layer packed itself, in a way that only it knows.
        """
        if self.packs_itself:
            raise LifecycleError(
                f"{type(self).__name__}: dequantized_weight must be asked of packed ternary "
                "weights, got a layer that did its own packing"
            )
        qweight, scale, *multiplier = self.packed()
        dtype = dtype or torch.float32
        return ops.unpack_weight(qweight, scale, self.out_features, dtype, *multiplier)

    def _float_dtype(self) -> torch.dtype:
        return self.float_dtype

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.float_dtype = dtype

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _shows_view(self) -> bool:
        # A layer that packed itself keeps what it registered, a weight among it or not.
        fields = self.__dict__
        return (
            fields.get("_is_deployed", False)
            and not fields.get("packs_itself", False)
            and super()._shows_view()
        )

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in a module; the eval cache is not in the way of its names."""
        with self._registering():
            super().register_buffer(name, *args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in a module; the eval cache is not in the way of its names."""
        with self._registering():
            super().register_parameter(name, param)

    @contextmanager
    def _registering(self) -> Iterator[None]:
        # A layer that packs itself may register what the cache serves until then.
        self.__dict__["_registers"] = True
        try:
            yield
        finally:
            del self.__dict__["_registers"]

    def extra_repr(self) -> str:
        """Returns what ``repr`` shows: sizes, state and scheme."""
        config = self.quant_config
        state = "deployed" if self._is_deployed else "latent"
        sizes = ""
        if hasattr(self, "in_features"):
            sizes = (
                f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.use_bias}, "
            )
        group = f", group_size={config.group_size}" if config.group_size else ""
        return (
            f"{sizes}{state}, weight={config.weight_granularity}{group}, "
            f"activation={config.activation}"
        )
