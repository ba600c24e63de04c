"""What latent experts keep packed between two steps of decoding."""

from __future__ import annotations

from torch import Tensor

from bitlayers.state import Packed
from bitlayers.training import Fingerprint, shows_writes

# A forward pass of up to so many tokens uses what was packed before, as it may be a decoding step
# of a batch: tokens arrive here in one row.
_STEP_TOKENS = 16


class PackedExperts:
    """Packed tensors of the experts of each projection, as long as its weights do not change."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Fingerprint, dict[int, Packed]]] = {}

    def of(self, name: str, weights: list[Tensor], tokens: int) -> dict[int, Packed]:
        """Returns where a forward pass in eval mode keeps what it packs, by the expert.

        Args:
            name: The projection.
            weights: What its packed tensors depend on.
            tokens: How many tokens the pass has.
        """
        if tokens > _STEP_TOKENS or not all(map(shows_writes, weights)):
            self._held.pop(name, None)
            return {}
        held = self._held.get(name)
        if held is None or not held[0].matches(weights):
            held = self._held[name] = Fingerprint(weights), {}
        return held[1]
