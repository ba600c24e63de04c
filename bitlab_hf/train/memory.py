"""Keeps the memory that a training step frees for the next step, on CPUs."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The names of glibc's malloc.h, and the most that an int holds.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _NO_LIMIT = -1, -3, -4, 2**31 - 1
# What glibc comes to by itself, a step after another: the thresholds no longer move once set.
_USUAL = (
    (_M_MMAP_MAX, 65536),
    (_M_MMAP_THRESHOLD, 32 << 20),
    (_M_TRIM_THRESHOLD, 64 << 20),
)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Has the C library hold on to freed memory meanwhile, and give it back at the end.

    By itself it hands blocks of 32 MiB and more, and what is free at the end of its heap, back to
    the system, which has to clear each page when the next step asks for it again.
    Does nothing where the C library is not glibc, or the environment sets its malloc
    (``MALLOC_..._``, ``GLIBC_TUNABLES``).
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen = chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if chosen or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT)
    try:
        yield
    finally:
        for name, value in _USUAL:
            library.mallopt(name, value)
        library.malloc_trim(0)
