"""PreparedLinear: what a layer's forward does not have to find out again for every token.

A decoder runs a small linear layer hundreds of times a token, and torch's dispatcher, the checks of
arguments and ctypes cost more there than the arithmetic. A layer prepares its constants once; a
call in eager inference then checks its input and makes one native call. Everything else (autograd,
autocast, torch.compile, tracing, functorch, dispatch modes, the profiler, other devices) goes
through the op, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitcore import checks, ops
from bitcore.kernels.registry import Kernels, kernels_for


class PreparedLinear:
    """`bitcore.ops.linear` with everything but its input given.

    Args:
        qweight: uint8 [ceil(N / 4), K].
        weight_scale: float32 [1], [N] or [N, K / G].
        bias: float [N], or None; it gets no gradient.
        out_features: N.
        activation: How x is quantized, as `bitcore.ops.linear` takes it.
    """

    def __init__(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
    ) -> None:
        self._given = qweight, weight_scale, bias
        self._pointers = _pointers(qweight, weight_scale, bias)
        # Packed weights are constants, so the bias is one too: only x gets a gradient.
        bias = None if bias is None else bias.detach()
        self._constants = qweight, weight_scale, bias, out_features, activation
        self._in_features = qweight.shape[-1]
        self._kernels: Kernels | None = None
        self._run: Callable[[Tensor], Tensor] | None = None
        if qweight.device.type == "cpu":
            checks.check_linear_weights(*self._constants)
            checks.check_devices("bitlab::linear", qweight, weight_scale, bias)
            self._kernels = kernels_for("cpu")
            prepare = getattr(self._kernels, "prepare_linear", None)
            self._run = prepare and prepare(*self._constants)

    def holds(self, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
        """Tells whether these are the tensors that were given, with the same memory."""
        given = self._given
        return (
            given[0] is qweight
            and given[1] is weight_scale
            and given[2] is bias
            and self._pointers == _pointers(qweight, weight_scale, bias)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., K]; see `bitcore.ops.linear`."""
        if (
            self._run is not None
            and ops.is_plain(x)
            and x.shape[-1] == self._in_features
            and x.dtype in checks.FLOAT_DTYPES
            and kernels_for("cpu") is self._kernels
        ):
            return self._run(x)
        return ops.linear(x, *self._constants)


def _pointers(qweight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    return qweight.data_ptr(), weight_scale.data_ptr(), 0 if bias is None else bias.data_ptr()
