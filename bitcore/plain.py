"""What may be computed past torch's dispatcher, which costs more than a small layer.

The dispatcher replaces, records, batches and casts, and it makes plain memory of tensors that only
stand for some (negated views, tensors of zeros). Where none of that is at work, nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Looked up once: `is_plain` runs hundreds of times a token.
_is_compiling = torch.compiler.is_compiling
_is_autocasting = torch.is_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_profiling = torch._C._autograd._profiler_enabled


def is_watched() -> bool:
    """Tells whether something records, traces, batches, differentiates or replaces what runs: what
    is computed then may be no plain tensor, and must not be kept for later.
    """
    return not (
        not _is_compiling()
        and _dispatch_modes() == 0
        and _tracing_state() is None
        and _functorch_level() is None
        and forward_ad._current_level < 0
    )


def is_plain(x: Tensor, device: str) -> bool:
    """Tells whether an op on x, on a device of this type, can be called past the dispatcher: eager
    inference, with nothing that watches, casts or profiles, on a tensor that is its memory.

    One that only stands for zeros is not told: its address is null, which kernels see at less cost.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _is_compiling()
        and _dispatch_modes() == 0
        and _tracing_state() is None
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and not _is_profiling()
        and not _is_autocasting(device)
        and not x.is_neg()
    )


def is_memory(tensor: Tensor) -> bool:
    """Tells whether a tensor's values are what its pointer points at."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )
