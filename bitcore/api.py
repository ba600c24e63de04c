"""What ``from bitcore import ...`` gives. Importing it registers ``torch.ops.bitlab``."""

from bitcore import ops as ops
from bitcore.config import BitQuantConfig
from bitcore.errors import BitLabError
from bitcore.estimators import register_estimator
from bitcore.kernels import BackendInfo, backends, use_backend
from bitcore.packing import pack_ternary, unpack_ternary

__all__ = [
    "BackendInfo",
    "BitLabError",
    "BitQuantConfig",
    "backends",
    "pack_ternary",
    "register_estimator",
    "unpack_ternary",
    "use_backend",
]
