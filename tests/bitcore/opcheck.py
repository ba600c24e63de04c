"""`torch.library.opcheck`, with its one costly part only where that can differ."""

from __future__ import annotations

from typing import Any

import torch

# What a backend can break: what an op may write to, and the shapes, strides and dtypes that its
# fake promises. A few milliseconds each.
OF_KERNELS = ("test_schema", "test_autograd_registration", "test_faketensor")
# Half a second: the graphs that torch.compile would make of the op and its gradient. They come of
# the fakes and of the gradients' formulas, which all backends share.
OF_GRAPHS = ("test_aot_dispatch_dynamic",)


def opcheck(op: Any, args: tuple[Any, ...], *, graphs: bool) -> None:
    """All of torch's checks of an op, or all but that of its graphs."""
    utils = OF_KERNELS + OF_GRAPHS if graphs else OF_KERNELS
    torch.library.opcheck(op, args, test_utils=utils)
