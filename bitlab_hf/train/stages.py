"""Layers that become ternary in stages: what is still in full precision takes their errors back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from bitlab_hf.model.tree import decoder_layers
from bitlab_hf.train.schedule import saved_attributes
from bitlayers import set_quant_strength


def stage_starts(stages: int, share: float, steps: int) -> list[int]:
    """Returns before which step each stage begins: the first before any, the last at a share.

    Args:
        stages: How many there are.
        share: Of the run.
        steps: Of the run.
    """
    if stages == 1:
        return [0]
    return [int(share * steps * number / (stages - 1)) for number in range(stages)]


def stage_blocks(stages: int, blocks: int) -> list[range]:
    """Returns which decoder layers become ternary in each stage: equally many, in their order."""
    ends = [round(blocks * number / stages) for number in range(stages + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


class StagedCalibration(TrainerCallback, ExportableState):
    """Trains a model of which more and more decoder layers are ternary, in stages.

    Before the first step of a stage its layers are calibrated in the model as it then is: the
    layers before them ternary, those behind in full precision and trained so far. What a stage has
    put wrong, all later layers learn to take back while they are still easy to move.

    A resumed run goes on exactly as one that was not stopped. Evaluation quantizes all layers, also
    those whose stage has not come, and is left out until the last stage has begun. After training
    all layers are ternary.

    Args:
        stages: How many; at most one a decoder layer and a step.
        share: At which share of the run the last one begins.
        fit: Calibrates decoder layers of the model that is trained; tells whether it could.

    Attributes:
        starts: Before which step each stage begins, once training has begun.
        blocks: The decoder layers of each.

    Raises:
        CheckpointError: When training resumes: the checkpoint was made with other stages.

    Source: layers one after another, the rest retrained, as in Incremental Network Quantization,
        arXiv 1702.03044, which goes weight by weight.
    """

    def __init__(self, stages: int, share: float, fit: Callable[[range], bool]) -> None:
        self.stages, self.share, self._fit = stages, share, fit
        self.starts: list[int] = []
        self.blocks: list[range] = []
        self._done = 0

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the stages."""
        return {
            "args": {"stages": self.stages, "share": self.share},
            "attributes": {"starts": self.starts},
        }

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Plans the stages, and leaves layers whose stage has not come in full precision."""
        layers = decoder_layers(model)
        steps = state.max_steps
        stages = max(1, min(self.stages, len(layers), steps))
        self.starts = stage_starts(stages, self.share, steps)
        if state.global_step > 0:
            # Shares are of the run as it began, also where it is now trained for longer.
            self.starts = list(saved_attributes(self, state)["starts"])
        self.blocks = stage_blocks(len(self.starts), len(layers))
        # A checkpoint is written before the next step's stage.
        self._done = sum(start < state.global_step for start in self.starts)
        if self._done == len(self.starts):
            return
        set_quant_strength(model, 0.0)
        for blocks in self.blocks[: self._done]:
            for block in layers[blocks.start : blocks.stop]:
                # Layers, and experts, which are none.
                set_quant_strength(block, 1.0)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begins the stages that are due."""
        while self._done < len(self.starts) and self.starts[self._done] <= state.global_step:
            if not self._fit(self.blocks[self._done]):
                self.starts = []
                set_quant_strength(model, 1.0)
                return
            self._done += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves an evaluation out that would say nothing."""
        if self._done < len(self.starts):
            control.should_evaluate = False

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Leaves the model at full strength."""
        set_quant_strength(model, 1.0)
