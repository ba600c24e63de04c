"""BitLab's errors.

Every class derives from `BitLabError` and from the built-in error that fits, so a caller can catch
either. Messages read ``{op}: {argument} must be {requirement}, got {actual}``, with at most one
line that names the fix.
"""

from __future__ import annotations


class BitLabError(Exception):
    """Base of all errors that BitLab raises on purpose."""


class ConfigError(BitLabError, ValueError):
    """A configuration field is unknown or has a value that is not allowed."""


class ArgumentTypeError(BitLabError, TypeError):
    """An argument has the wrong type or dtype."""


class ArgumentError(BitLabError, ValueError):
    """An argument has the wrong shape or value."""


class NonFiniteError(BitLabError, ValueError):
    """A weight holds NaN or infinity, which has no ternary form."""


class LifecycleError(BitLabError, RuntimeError):
    """A layer or model is not in a state that allows the call."""


class DerivativeError(BitLabError, NotImplementedError):
    """A derivative was asked for that an op does not have."""


class BackendError(BitLabError, RuntimeError):
    """A kernel backend or instruction set that was asked for is not available."""


class CheckpointError(BitLabError, RuntimeError):
    """A checkpoint's files, header or tensors are not what its configuration says."""


class MissingExtraError(BitLabError, ImportError):
    """An optional dependency is not installed."""
