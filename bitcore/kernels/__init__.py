"""Kernel backends: who runs what, and why."""

from bitcore.kernels.registry import BackendInfo, backends, kernels_for, use_backend

__all__ = ["BackendInfo", "backends", "kernels_for", "use_backend"]
