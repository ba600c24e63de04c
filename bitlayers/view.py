"""WeightView: what ``layer.weight`` is once the float weight is gone.

Models, losses and adapters read ``layer.weight.dtype``, ``.device`` or ``.shape``, or multiply with
it. The view answers as the float weight of codes times scale would. It refers to the packed tensors
and makes the values only when an operation needs them; as the right side of ``F.linear`` or
``matmul`` a ternary weight is not even then unpacked as a whole. It is no Parameter, and it refuses
to be written or trained: what was written would be lost.

torchao and optimum-quanto keep the weight itself as such a subclass. Here it stands beside the
packed tensors, so that these stay plain tensors for every loader, compiler and sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from bitcore import ops
from bitcore.errors import LifecycleError
from bitcore.quantize import dequantize_rows_int8

_aten = torch.ops.aten
_LINEAR = {F.linear, torch._C._nn.linear}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_TRAINING = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
# What reads or shares memory past any operation: it gets the values, in memory of their own.
_MEMORY = {
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage,
    Tensor.data_ptr, Tensor.storage, Tensor.share_memory_,
}  # fmt: skip
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


class WeightView(Tensor):
    """The float weight [N, K], or its transpose, that packed tensors stand for.

    Args:
        qweight: uint8 [ceil(N / 4), K] ternary, or int8 [N, K].
        scale: float32 [1], [N] or [N, K / G]; [N] for int8.
        shape: ``(N, K)``.
        dtype: What it is read in.
        transposed: Whether the view is [K, N].
        multiplier: uint8 [N, K / G] beside a scale [N], or None.
    """

    # transformers initializes what a file lacks; there is nothing to initialize here.
    _is_hf_initialized = True
    _qweight: Tensor
    _scale: Tensor
    _multiplier: Tensor | None
    _rows: int
    _transposed: bool

    @staticmethod
    def __new__(
        cls,
        qweight: Tensor,
        scale: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        transposed: bool = False,
        multiplier: Tensor | None = None,
    ) -> WeightView:
        """Makes the view; nothing is computed."""
        size, strides = tuple(shape), (shape[1], 1)
        if transposed:
            size, strides = size[::-1], strides[::-1]
        view: WeightView = Tensor._make_wrapper_subclass(
            cls, size, strides=strides, dtype=dtype, device=qweight.device, requires_grad=False
        )
        view._qweight, view._scale = qweight.detach(), scale
        view._rows, view._transposed, view._multiplier = shape[0], transposed, multiplier
        return view

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def dequantized(self) -> Tensor:
        """Returns codes times scale as a plain tensor of the view's shape and dtype."""
        if self._qweight.dtype == torch.uint8:
            weight = ops.unpack_weight(
                self._qweight, self._scale, self._rows, self.dtype, self._multiplier
            )
        else:
            weight = dequantize_rows_int8(self._qweight, self._scale, self.dtype)
        return weight.t() if self._transposed else weight

    def transposed(self) -> WeightView:
        """Returns the view of the transpose."""
        shape = (self._rows, self._qweight.shape[1])
        return WeightView(
            self._qweight, self._scale, shape, self.dtype, not self._transposed, self._multiplier
        )

    def _multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns ``x @ W.T + bias`` from packed weights; None where torch has to do it.

        Activations are not quantized: it is what the float layer would compute.
        """
        if (
            self._qweight.dtype != torch.uint8
            or type(x) not in (Tensor, torch.nn.Parameter)
            or x.dtype != self.dtype
            or x.dim() < 2
            or x.shape[-1] != self._qweight.shape[1]
            or x.device != self.device
            or (bias is not None and bias.requires_grad)
        ):
            return None
        return ops.linear(
            x, self._qweight, self._scale, bias, self._rows, "float", self._multiplier
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Takes products with a packed weight; refuses what would train it."""
        kwargs = kwargs or {}
        if func in _TRAINING and (len(args) < 2 or args[1]) and kwargs.get("requires_grad", True):
            _refuse("train")
        written = func is Tensor.__setitem__ or func is Tensor.data.__set__  # type: ignore[attr-defined]
        if written and isinstance(args[0], WeightView):
            _refuse("take values")
        if func in _MEMORY:
            args = tree_map_only(WeightView, WeightView.dequantized, args)
        with torch._C.DisableTorchFunctionSubclass():
            product = _product(func, args, kwargs)
            return func(*args, **kwargs) if product is None else product

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs any operation on the values; only an alias or a transpose stays a view."""
        kwargs = kwargs or {}
        if func in _ALIASES:
            view = args[0]
            return view.transposed().transposed()
        if _is_transpose(func, args):
            return args[0].transposed()
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(
                isinstance(one, WeightView) for one in tree_leaves(given.get(argument.name))
            ):
                _refuse("take values")
        plain, named = tree_map_only(WeightView, WeightView.dequantized, (args, kwargs))
        return func(*plain, **named)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Says what it is without computing it."""
        kind = "ternary" if self._qweight.dtype == torch.uint8 else "int8"
        return f"WeightView({list(self.shape)}, {kind}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Returns the values: a copy is free to be written."""
        return self.dequantized().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the values."""
        return self.dequantized().clone().__reduce_ex__(protocol)


def _is_transpose(func: Any, args: tuple[Any, ...]) -> bool:
    if func is _aten.transpose.int:
        return {args[1] % 2, args[2] % 2} == {0, 1}
    return func is _aten.t.default or (
        func is _aten.permute.default and [axis % 2 for axis in args[1]] == [1, 0]
    )


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns a product whose right side is a packed weight; None for any other call."""
    if len(args) < 2 or not isinstance(args[1], WeightView) or isinstance(args[0], WeightView):
        return None
    x, view = args[0], args[1]
    if func in _LINEAR and not view._transposed:
        return view._multiplied(x, args[2] if len(args) > 2 else kwargs.get("bias"))
    if func in _PRODUCTS and view._transposed and not kwargs:
        return view._multiplied(x, None)
    return None


def _refuse(what: str) -> NoReturn:
    raise LifecycleError(
        f"weight: it must not be asked to {what}, got a view of packed weights\nTrain adapters on "
        "the deployed model, or the latent model; model.dequantize() gives float weights back."
    )
