"""How a model that inductor compiled calls the CPU kernels: from C++, without Python.

An op that is implemented in Python costs a compiled model more than a small layer takes: the
dispatcher, the checks and ctypes. Inductor's C++ may call a C function for an op instead, and
`inductor_shims.inl` defines those for ours, on torch's stable C interface. Inductor compiles it
with the graph, so nothing of torch is needed to build BitLab.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitcore.errors import BackendError
from bitcore.kernels.cpu import CpuKernels
from bitcore.kernels.native import library_path
from bitcore.kernels.registry import kernels_for
from bitcore.schemas import library

# The first whose C interface has sums.
_OLDEST_TORCH = (2, 10)
_SHIMS = Path(__file__).with_name("inductor_shims.inl")
# Inductor writes `extern <text>;`, so that the text has to begin and end within a declaration.
_FRAME = 'int bitlab_shims;\n#define BITLAB_LIBRARY "{library}"\n{text}\nextern int bitlab_shims'

library.define("sum_last(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _sum_last(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


library.impl("sum_last", _sum_last, "CPU")


@torch.library.register_fake("bitlab::sum_last", lib=library)
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1))


def sum_as_eager(graph: torch.fx.Graph) -> None:
    """Makes a graph's means over the last axis sums of torch's own, divided: inductor would add up
    in another order, which changes the last bit of every second norm, and a text in the end.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        x, axes = node.args[0], list(node.args[1])
        value = x.meta["val"]
        keeps = len(node.args) > 2 and node.args[2]
        if axes not in ([-1], [value.dim() - 1]) or not keeps or node.kwargs:
            continue
        with graph.inserting_before(node):
            total = graph.call_function(torch.ops.bitlab.sum_last.default, (x,))
            mean = graph.call_function(torch.ops.aten.div.Scalar, (total, value.shape[-1]))
        total.meta, mean.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(mean)
        graph.erase_node(node)


def inductor_options() -> dict[str, Any]:
    """Returns the options with which inductor's C++ calls the kernels, for
    ``torch._inductor.aoti_compile_and_package``; none of them where the reference runs.

    Precision casts are emulated: a fused operation rounds where the eager one does.

    Raises:
        BackendError: torch is too old, or the library's path cannot stand in C++.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        raise BackendError(
            f"inductor_options: torch must be {'.'.join(map(str, _OLDEST_TORCH))} or newer, "
            f"got {torch.__version__}"
        )
    if not isinstance(kernels_for("cpu"), CpuKernels):
        return {"emulate_precision_casts": True}
    library = str(library_path("bitkernels_cpu").resolve())
    if any(mark in library for mark in '"\\\n'):
        raise BackendError(
            "inductor_options: the library's path must hold no quotes, backslashes or line breaks, "
            f"got {library!r}"
        )
    text = _FRAME.format(library=library, text=_SHIMS.read_text())
    ops = torch.ops.bitlab
    return {
        "emulate_precision_casts": True,
        # One text defines all.
        "aot_inductor.custom_ops_to_c_shims": {
            ops.linear.default: [text],
            ops.linear_int8.default: [],
            ops.sum_last.default: [],
        },
    }
