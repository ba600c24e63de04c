"""The schemas of ``torch.ops.bitlab.*``; `bitcore.ops` implements them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

from bitcore.errors import DerivativeError


class _Library(torch.library.Library):
    """A library whose ops refuse what torch would drop in silence: a forward-mode tangent.

    Ops without a formula for it are given the primal values alone. Only the autograd kernel sees
    the tangents, those of ``torch.func.jvp`` too.
    """

    def impl(
        self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any
    ) -> None:
        """Registers an implementation; see torch."""
        if dispatch_key == "Autograd":
            fn = _refuse_tangents(f"bitlab::{op_name}", fn)
        super().impl(op_name, fn, dispatch_key, **options)


def _refuse_tangents(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def guarded(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for arg in args:
                if _has_tangent(arg):
                    raise DerivativeError(
                        f"{op}: the arguments must have no forward-mode tangent, got one\n"
                        "Use reverse mode: torch.autograd.grad or backward()."
                    )
        return kernel(keyset, *args)

    return guarded


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None


library = _Library("bitlab", "DEF")
# What the ops are implemented for.
DEVICES = ("CPU", "CUDA")
_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("quantize_activation(Tensor x, bool per_tensor) -> (Tensor, Tensor)", tags=_TAGS)
library.define(
    "pack_weight(Tensor weight, str granularity, int group_size) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.define("pack_codes(Tensor weight, Tensor step) -> Tensor", tags=_TAGS)
library.define(
    "learned_gradients(Tensor dw, Tensor weight, Tensor step) -> (Tensor, Tensor)", tags=_TAGS
)
library.define(
    "estimate(Tensor weight, str name, str granularity, int group_size)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "unpack_weight(Tensor qweight, Tensor weight_scale, SymInt out_features, ScalarType dtype,"
    " Tensor? multiplier=None) -> Tensor",
    tags=_TAGS,
)
library.define("matmul(Tensor codes, Tensor qweight, SymInt out_features) -> Tensor", tags=_TAGS)
library.define(
    "linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias, SymInt out_features,"
    " str activation, ScalarType out_dtype, Tensor? multiplier=None) -> Tensor",
    tags=_TAGS,
)
library.define(
    "experts_linear(Tensor x, Tensor index, Tensor qweight, Tensor weight_scale, Tensor? bias,"
    " SymInt out_features, str activation, ScalarType out_dtype, Tensor? multiplier=None)"
    " -> Tensor",
    tags=_TAGS,
)
library.define(
    "qat_linear(Tensor x, Tensor weight, Tensor? bias, str granularity, int group_size,"
    " str activation, ScalarType out_dtype, Tensor? step=None, Tensor? scale=None,"
    " Tensor? multiplier=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "linear_int8(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "input_gradient(Tensor dy, Tensor qweight, Tensor weight_scale, SymInt out_features,"
    " ScalarType dtype, Tensor? multiplier=None) -> Tensor",
    tags=_TAGS,
)
library.define(
    "experts_input_gradient(Tensor dy, Tensor index, Tensor qweight, Tensor weight_scale,"
    " SymInt out_features, SymInt tokens, ScalarType dtype, Tensor? multiplier=None) -> Tensor",
    tags=_TAGS,
)
library.define(
    "input_gradient_int8(Tensor dy, Tensor qweight, Tensor weight_scale, ScalarType dtype)"
    " -> Tensor",
    tags=_TAGS,
)
