"""How a layer's weight starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

INIT_METHODS: dict[str, Callable[[Tensor], Any]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
}
