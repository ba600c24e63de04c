"""What every module with quantized weights does: keeps its scales in float32, shows a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitcore.errors import LifecycleError
from bitlayers.view import WeightView


class QuantizedModule(nn.Module):
    """Base of the modules that hold ``qweight`` and ``qweight_scale``.

    The scales stay in float32, whatever dtype the module is cast to. Once there is no float weight,
    ``weight`` is a `WeightView`: whoever reads its dtype, device, shape or values finds those of
    the float layer of codes times scale. It is made when it is read, holds no memory and is in no
    state dict; the module's own forward never reads it.
    """

    # Any: nn.Linear and nn.Embedding declare it as a tensor.
    weight: Any
    qweight: Tensor
    qweight_scale: Tensor

    def _float_dtype(self) -> torch.dtype:
        """Returns the dtype of the float weight that `weight` stands for."""
        raise NotImplementedError

    def _set_dtype(self, dtype: torch.dtype) -> None:
        """Takes another dtype for that of the float weight; changes no value."""
        raise NotImplementedError

    def _weight_shape(self) -> tuple[int, int]:
        """Returns ``(N, K)``."""
        raise NotImplementedError

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns codes times scale, [N, K], rounded once to dtype (default float32)."""
        raise NotImplementedError

    def _shows_view(self) -> bool:
        parameters = self.__dict__.get("_parameters", {})
        held = parameters.get("qweight") is not None and "weight" in parameters
        return held and parameters["weight"] is None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._shows_view():
            dtype = self._float_dtype()
            if torch.compiler.is_compiling():
                # In a graph a subclass that is made on the way has no place; what nobody uses of
                # this is dropped from it.
                return self.dequantized_weight(dtype)
            qweight, scale = self._parameters["qweight"], self._buffers["qweight_scale"]
            multiplier = self._buffers.get("qweight_multiplier")
            return WeightView(qweight, scale, self._weight_shape(), dtype, multiplier=multiplier)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and value is not None and self._shows_view():
            raise LifecycleError(
                f"{type(self).__name__}: weight must stay as it is once packed, got a "
                f"{type(value).__name__} to put in its place\nChange the latent or float model and "
                "deploy it again, or call model.dequantize() first."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self._buffers.get("qweight_scale")
        learned = self._parameters.get("learned_scale")
        exact = None if learned is None else (learned.data, learned.grad)
        super()._apply(fn, recurse)
        learned = self._parameters.get("learned_scale")
        if exact is not None and learned is not None and learned.dtype != torch.float32:
            learned.data = exact[0].to(learned.device)
            learned.grad = None if exact[1] is None else exact[1].to(learned.device)
        moved = self._buffers.get("qweight_scale")
        if scale is not None and moved is not None and moved.dtype != torch.float32:
            # `.to(bfloat16)` moves the scale but must not round it.
            self._buffers["qweight_scale"] = scale.to(moved.device)
        return self


class TypedModule(QuantizedModule):
    """A quantized module that notes the dtype of the float weight that it stands for.

    Attributes:
        dtype: That dtype; follows ``module.to(dtype)``.
    """

    dtype: torch.dtype

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _float_dtype(self) -> torch.dtype:
        return self.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._set_dtype(cast_dtype(fn, self.dtype))
        return self


def cast_dtype(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """Returns what a module's ``_apply`` makes of tensors of a dtype."""
    return fn(torch.empty(0, dtype=dtype, device="cpu")).dtype
