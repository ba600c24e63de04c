"""BitLab's core: the packed format, the arithmetic, the torch ops and their kernels.

The names are those of `bitcore.api`; see `bitcore.lazy`.
"""

from typing import TYPE_CHECKING

from bitcore.lazy import attach

if TYPE_CHECKING:
    from bitcore.api import *  # noqa: F403
else:
    __getattr__ = attach(__name__)
