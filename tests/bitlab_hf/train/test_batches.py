"""How many examples a training step takes where nobody says."""

from __future__ import annotations

import pytest

from bitlab_hf.train.batches import batch_size


@pytest.mark.parametrize(
    ("examples", "processes", "expected"),
    [(1, 1, 1), (200, 1, 1), (2_000, 1, 2), (2_000, 2, 1), (7_999, 1, 7), (10**6, 8, 8)],
)
def test_batch_size(examples: int, processes: int, expected: int) -> None:
    assert batch_size(examples, processes) == expected
