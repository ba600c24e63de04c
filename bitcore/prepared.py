"""PreparedLinear, PreparedExperts: what a forward does not have to find out again for every token.

A decoder runs a small linear layer hundreds of times a token, and torch's dispatcher, the checks of
arguments and ctypes cost more there than the arithmetic. A layer prepares its constants once; a
call in eager inference then checks its input and makes one native call. Everything else (see
`bitcore.plain`; an input on another device) goes through the op, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitcore import checks, ops
from bitcore.kernels.registry import Kernels, kernels_for
from bitcore.ops_experts import check_experts, is_index
from bitcore.plain import is_memory, is_plain

# Device types whose kernels may prepare a layer.
_DEVICES = ("cpu", "cuda")


def is_preparable(x: Tensor, *weights: Tensor | None) -> bool:
    """Tells whether a layer can be prepared while it runs on x: what is made under a trace or a
    fake mode is no constant.
    """
    given = [one for one in weights if one is not None]
    device = given[0].device.type
    return device in _DEVICES and is_plain(x, device) and all(map(is_memory, given))


class _Prepared:
    """What both have: the constants, checked and handed to the kernels."""

    # The op, the kernels' function that prepares it, and what checks the constants.
    _op: str
    _preparing: str
    _check: Callable[..., None]

    def __init__(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None = None,
    ) -> None:
        self._given = qweight, weight_scale, bias, multiplier
        # Packed weights are constants, so the bias is one too: only x gets a gradient.
        bias = None if bias is None else bias.detach()
        self._constants = qweight, weight_scale, bias, out_features, activation, multiplier
        self._in_features = qweight.shape[-1]
        self._device = qweight.device
        self._type = qweight.device.type
        self._kernels: Kernels | None = None
        self._run: Callable[..., Tensor] | None = None
        if self._type in _DEVICES:
            checks.check_devices(self._op, qweight, weight_scale, bias, multiplier)
            names = ("qweight", "weight_scale", "bias", "multiplier")
            for name, one in zip(names, self._given, strict=True):
                if one is not None:
                    checks.check_storage(self._op, name, one)
            self._check(*self._constants)
            self._kernels = kernels_for(self._type)
            prepare = getattr(self._kernels, self._preparing, None)
            # What only stands for memory is made memory by the dispatcher.
            if prepare and all(one is None or is_memory(one) for one in self._given):
                self._run = prepare(*self._constants)
        self._pointers = [0 if one is None else one.data_ptr() for one in self._given]

    def holds(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        multiplier: Tensor | None = None,
    ) -> bool:
        """Tells whether these are the tensors that were given, with the same memory."""
        given, pointers = self._given, self._pointers
        return (
            given[0] is qweight
            and given[1] is weight_scale
            and given[2] is bias
            and given[3] is multiplier
            and pointers[0] == qweight.data_ptr()
            and pointers[1] == weight_scale.data_ptr()
            and (bias is None or pointers[2] == bias.data_ptr())
            and (multiplier is None or pointers[3] == multiplier.data_ptr())
        )


class PreparedLinear(_Prepared):
    """`bitcore.ops.linear` with everything but its input given.

    Args:
        qweight: uint8 [ceil(N / 4), K].
        weight_scale: float32 [1], [N] or [N, K / G].
        bias: float [N], or None; it gets no gradient.
        out_features: N.
        activation: How x is quantized, as `bitcore.ops.linear` takes it.
        multiplier: uint8 [N, K / G], or None.
    """

    _op = "bitlab::linear"
    _preparing = "prepare_linear"
    _check = staticmethod(checks.check_linear_weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., K]; see `bitcore.ops.linear`."""
        if (
            self._run is not None
            and x.device == self._device
            and is_plain(x, self._type)
            and (shape := x.shape)
            and shape[-1] == self._in_features
            and (dtype := x.dtype) in checks.FLOAT_DTYPES
            and kernels_for(self._type) is self._kernels
        ):
            return self._run(x, shape, dtype)
        return ops.linear(x, *self._constants)


class PreparedExperts(_Prepared):
    """`bitcore.ops.experts_linear` with everything but its input and index given: the arguments of
    `PreparedLinear`, those of all experts.
    """

    _op = "bitlab::experts_linear"
    _preparing = "prepare_experts"
    _check = staticmethod(check_experts)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """Runs the experts on x [M, K]; see `bitcore.ops.experts_linear`."""
        if (
            self._run is not None
            and x.device == self._device
            and is_plain(x, self._type)
            and x.dim() == 2
            and x.shape[1] == self._in_features
            and (dtype := x.dtype) in checks.FLOAT_DTYPES
            and kernels_for(self._type) is self._kernels
            and is_index(index, len(x), self._device)
        ):
            return self._run(x, index, dtype)
        return ops.experts_linear(x, index, *self._constants)
