"""The schemas of ``torch.ops.bitlab.*``; `bitcore.ops` implements them."""

from __future__ import annotations

import torch

library = torch.library.Library("bitlab", "DEF")
# What the ops are implemented for.
DEVICES = ("CPU", "CUDA")
_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("quantize_activation(Tensor x, bool per_tensor) -> (Tensor, Tensor)", tags=_TAGS)
library.define(
    "pack_weight(Tensor weight, str granularity, int group_size) -> (Tensor, Tensor)", tags=_TAGS
)
library.define("pack_codes(Tensor weight, Tensor step) -> Tensor", tags=_TAGS)
library.define(
    "estimate(Tensor weight, str name, str granularity, int group_size) -> (Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "unpack_weight(Tensor qweight, Tensor weight_scale, SymInt out_features, ScalarType dtype)"
    " -> Tensor",
    tags=_TAGS,
)
library.define("matmul(Tensor codes, Tensor qweight, SymInt out_features) -> Tensor", tags=_TAGS)
library.define(
    "linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias, SymInt out_features,"
    " str activation, ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "qat_linear(Tensor x, Tensor weight, Tensor? bias, str granularity, int group_size,"
    " str activation, ScalarType out_dtype, Tensor? step=None, Tensor? scale=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
library.define(
    "linear_int8(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "input_gradient(Tensor dy, Tensor qweight, Tensor weight_scale, SymInt out_features,"
    " ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "input_gradient_int8(Tensor dy, Tensor qweight, Tensor weight_scale, ScalarType dtype)"
    " -> Tensor",
    tags=_TAGS,
)
