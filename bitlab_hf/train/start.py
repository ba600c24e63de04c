"""A calibrated start: what a Trainer does before the first step of a ternary model."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.logging import tqdm

from bitcore.errors import ArgumentError, ConfigError, LifecycleError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.fit.calibrate import CalibrationReport, Progress, calibrate
from bitlab_hf.fit.kept import OtherFitError
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train.guard import calibration_folder
from bitlab_hf.train.recipe import Recipe
from bitlayers import BitLayerBase
from bitlayers.experts import BitExperts

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger("bitlab")

# In the run's output folder.
REPORT_FILE = "calibration_report.json"
# Samples that are run at a time.
_BATCH = 8
# Batches whose loss tells whether calibration was of use; that of all would take minutes.
_COMPARED = 4


class CalibratedStartMixin(_Base):
    """Put before a Trainer class with a ``recipe``: calibrates the model on examples of the
    training data before the first step, where the recipe asks for it.

    Left out where training resumes, and where latent weights are frozen, as under an adapter.
    A run that was killed meanwhile goes on with the layers that it had come to.
    Undone where the loss of some of them does not fall: weights that were trained ternary already
    lose by it. All processes do the same, on the same examples. What it did to each layer stands in
    ``calibration_report.json`` in the run's output folder.

    Attributes:
        calibration: What it did; None if nothing.
        calibration_progress: Called with layers done, layers in all and the layer's name; None for
            the progress bar that the Trainer's other ones look like.

    Raises:
        ArgumentError: The model comes from ``model_init``, and the recipe changes it before the
            first step.
    """

    recipe: Recipe
    calibration: CalibrationReport | None = None
    calibration_progress: Progress | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        recipe = self.recipe
        if self.model_init is not None and (recipe.calibration_samples or recipe.teacher_share):
            raise ArgumentError(
                "BitLabTrainer: model_init must be None for a recipe that calibrates or teaches "
                "before the first step, got one: the Trainer makes the model anew behind that\n"
                "Pass model=; or call bitlab_hf.train.calibrate in model_init, with a recipe whose "
                "calibration_samples and teacher_share are 0."
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Calibrates, unless a run goes on; then trains."""
        model = self.accelerator.unwrap_model(self.model)
        wanted = self.recipe.calibration_samples and self.train_dataset is not None
        if not resume_from_checkpoint and self.is_world_process_zero():
            # An earlier run's.
            self._report_file.unlink(missing_ok=True)
        if wanted and not resume_from_checkpoint:
            self.calibration = self._calibrate(model)
            if self.calibration is not None:
                self._report(self.calibration)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.is_world_process_zero():
            shutil.rmtree(calibration_folder(self.args), ignore_errors=True)
        return result

    @torch.no_grad()
    def _calibrate(self, model: Any) -> CalibrationReport | None:
        if not _is_trainable(model):
            return None
        layers: list[BitLayerBase | BitExperts] = [one.module for one in quantized_layers(model)]
        layers += [one.module for one in expert_modules(model)]
        if is_deepspeed_zero3_enabled():
            logger.warning(
                "BitLabTrainer: training starts without calibration: ZeRO-3 holds the weights in "
                "partitions\nCalibrate before with bitlab_hf.train.calibrate, and save the model."
            )
            return None
        own = {one for layer in layers for one in layer.parameters(recurse=False)}
        # Of what is not ternary a calibration changes the last norm.
        parameters = [one for one in model.parameters() if one in own or one.dim() == 1]
        before = [one.detach().clone() for one in parameters]
        if self._moves_late():
            self._move_model_to_device(model, self.args.device)
        batches = self._calibration_batches(_widest(layers))
        with self.accelerator.autocast(), self._calibration_bar() as progress:
            rounded = _loss(model, batches[:_COMPARED])
            try:
                samples = [row for batch in batches for row in _rows(batch)]
                report = self._calibrate_kept(model, samples, progress)
            except (ArgumentError, ConfigError, LifecycleError) as error:
                logger.warning("BitLabTrainer: training starts without calibration: %s", error)
                return None
            calibrated = _loss(model, batches[:_COMPARED])
        if calibrated < rounded or math.isnan(calibrated):
            logger.info("%s; loss %.4f, rounded %.4f", report, calibrated, rounded)
            return report
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        for layer in layers:
            layer.invalidate_cache()
        logger.warning(
            "BitLabTrainer: training starts without calibration: it took the loss of %d examples "
            "from %.4f to %.4f",
            sum(1 for batch in batches[:_COMPARED] for _ in _rows(batch)),
            rounded,
            calibrated,
        )
        return None

    def _calibrate_kept(
        self, model: Any, samples: list[Any], progress: Progress
    ) -> CalibrationReport:
        """Calibrates; goes on where a run that was killed has come to."""
        folder = calibration_folder(self.args)
        kept: dict[str, Any] = {"folder": folder, "progress": progress}
        try:
            return calibrate(model, samples, _BATCH, **kept)
        except OtherFitError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("BitLabTrainer: calibration begins anew: %s", reason)
        # Not before all have seen what is wrong with it: who came late would find nothing.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return calibrate(model, samples, _BATCH, **kept)

    @property
    def _report_file(self) -> Path:
        return Path(str(self.args.output_dir)) / REPORT_FILE

    def _report(self, found: CalibrationReport) -> None:
        """Writes what was found into the run's folder; warns of what keeps its rounding."""
        if found.rounded:
            logger.warning(
                "BitLabTrainer: %d experts keep their rounding, such as %s: no token of the "
                "calibration's examples reached them",
                len(found.rounded),
                found.rounded[0],
            )
        if not self.is_world_process_zero():
            return
        content = {
            "samples": found.samples,
            "tokens": found.tokens,
            "mean_error": sum(one.error for one in found.layers) / max(1, len(found.layers)),
            "layers": [asdict(one) for one in found.layers],
            "rounded": found.rounded,
        }
        write_atomically(self._report_file, json.dumps(content, indent=2) + "\n")

    def _calibration_batches(self, widest: int) -> list[dict[str, Any]]:
        """Returns examples of the training data as the model takes them; draws from no generator
        that training draws from.

        Args:
            widest: The inputs of the widest layer.
        """
        data: Any = self.train_dataset
        if isinstance(data, torch.utils.data.IterableDataset):
            rows = self._enough(iter(data), widest)
        else:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            generator = torch.Generator().manual_seed(seed)
            # The sampler draws the same order, so these are what training comes to last: a layer
            # that was fitted to an example is nearer to the original there than elsewhere, and the
            # first steps would learn little.
            order = torch.randperm(len(data), generator=generator).flip(0)
            rows = self._enough((data[int(index)] for index in order), widest)[::-1]
        collate: Any = self._get_collator_with_removed_columns(self.data_collator)
        with torch.random.fork_rng(devices=()):
            parts = [collate(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
        batches = [dict(self._prepare_inputs(part)) for part in parts]
        if not self.is_fsdp_enabled:
            return batches
        from accelerate.utils.operations import send_to_device

        # The model may still be whole then, on the CPU.
        device = next(self.accelerator.unwrap_model(self.model).parameters()).device
        return [send_to_device(batch, device) for batch in batches]

    def _moves_late(self) -> bool:
        """Tells whether the Trainer moves the model to its device only when training begins."""
        args = self.args
        elsewhere = self.is_fsdp_enabled or self.is_model_parallel
        if elsewhere or self.is_distributed_loading_by_transformers:
            return False
        late = self.is_deepspeed_enabled or args.fp16_full_eval or args.bf16_full_eval
        return args.place_model_on_device is None and bool(late)

    def _enough(self, examples: Iterator[Any], widest: int) -> list[Any]:
        """Returns as many examples as the recipe asks for, or more of them where they are short."""
        recipe, wanted = self.recipe, self.recipe.calibration_tokens * widest
        rows = list(islice(examples, recipe.calibration_samples))
        tokens = sum(map(_tokens, rows))
        # Examples that are no token ids yet, for a collator to tokenize, are not counted.
        while 0 < tokens < wanted and (row := next(examples, None)) is not None:
            rows.append(row)
            tokens += _tokens(row)
        if len(rows) > recipe.calibration_samples and self.is_world_process_zero():
            logger.warning(
                "BitLabTrainer: calibrates on %d examples instead of %d: with %d tokens they hold "
                "%.1f for each of the %d inputs of the widest layer, of %d that are wanted",
                len(rows), recipe.calibration_samples, tokens, tokens / widest, widest,
                recipe.calibration_tokens,
            )  # fmt: skip
        return rows

    @contextmanager
    def _calibration_bar(self) -> Iterator[Progress]:
        if self.calibration_progress is not None:
            yield self.calibration_progress
            return
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(desc="calibrated start", unit="layer", disable=hidden) as bar:

            def advance(_done: int, total: int, _name: str) -> None:
                bar.total = total
                bar.update(1)

            yield advance


def _rows(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what `calibrate` reads of each row of a batch."""
    if "input_ids" not in batch:
        yield batch
        return
    mask: Any = batch.get("attention_mask")
    masked = mask is not None and mask.dim() == 2
    for index, ids in enumerate(batch["input_ids"]):
        yield {"input_ids": ids, "attention_mask": mask[index]} if masked else {"input_ids": ids}


def _tokens(row: Any) -> int:
    """Returns how many tokens of an example are no padding; none where it is not of token ids."""
    held = row if isinstance(row, Mapping) else {}
    ids, mask = held.get("input_ids"), held.get("attention_mask")
    if mask is not None:
        return int(torch.as_tensor(mask).sum())
    return 0 if ids is None else torch.as_tensor(ids).numel()


def _widest(layers: list[BitLayerBase | BitExperts]) -> int:
    """Returns the most inputs that a layer, or a matrix of an expert, has."""
    inputs: list[int] = []
    for one in layers:
        if isinstance(one, BitExperts):
            inputs += [stack.in_features for stack in one.stacks.values()]
        else:
            inputs.append(one.weight.shape[1])
    return max(inputs)


def _is_trainable(model: nn.Module) -> bool:
    """Tells whether there are latent layers or experts, and all of them learn."""
    layers = [one.module for one in quantized_layers(model) if not one.module.is_deployed]
    weights: list[Tensor | None] = [layer.weight for layer in layers]
    for found in expert_modules(model):
        weights += [found.module._parameters.get(name) for name in found.module.stacks]
    return bool(weights) and all(one is not None and one.requires_grad for one in weights)


def _loss(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    """Returns the mean loss of the batches in eval mode; NaN for a model that gives none."""
    training = model.training
    model.eval()
    losses = []
    try:
        for batch in batches:
            loss = getattr(model(**batch), "loss", None)
            losses.append(math.nan if loss is None else float(loss))
    finally:
        model.train(training)
    return sum(losses) / max(1, len(losses))
