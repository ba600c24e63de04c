"""What a run takes where nobody says: the optimizer's arguments, the examples of a step."""

from __future__ import annotations

from typing import Any

# Of TrainingArguments: what the recipes' rates were raced with. Squared gradients are averaged over
# some 20 steps; over 1000, as by transformers' 0.999, is as many as a run may have.
OPTIMIZER: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    # A share of the steps.
    "warmup_steps": 0.1,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
}

# Where tokens are few it is steps that are short: 200 steps of one block of 256 tokens bring
# SmolLM2 nearer to its original than 100 of two.
_STEPS = 1000
_MOST = 8


def batch_size(examples: int, processes: int = 1) -> int:
    """Returns how many examples a step of each process takes: as many as leave a run its steps.

    Args:
        examples: How many the run reads.
        processes: How many train together.

    Returns:
        1 to 8: 8 from 8,000 examples on.
    """
    return max(1, min(_MOST, examples // (_STEPS * processes)))
