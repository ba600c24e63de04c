"""BitLab in transformers: ternary models from ``from_pretrained`` to ``push_to_hub``.

The names are those of `bitlab_hf.api`; see `bitcore.lazy`.
"""

from typing import TYPE_CHECKING

from bitcore.lazy import attach

if TYPE_CHECKING:
    from bitlab_hf.api import *  # noqa: F403
else:
    __getattr__ = attach(__name__)
