"""What a run takes where nobody says."""

from __future__ import annotations

import pytest

from bitlab_hf.train.defaults import OPTIMIZER, batch_size


@pytest.mark.parametrize(
    ("examples", "processes", "expected"),
    [(1, 1, 1), (200, 1, 1), (2_000, 1, 2), (2_000, 2, 1), (7_999, 1, 7), (10**6, 8, 8)],
)
def test_batch_size(examples: int, processes: int, expected: int) -> None:
    assert batch_size(examples, processes) == expected


def test_what_the_rates_were_raced_with() -> None:
    """Other values ask for another race: docs/quality.md is of these."""
    assert OPTIMIZER == {
        "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "adam_beta2": 0.95, "weight_decay": 0.0,
    }  # fmt: skip
