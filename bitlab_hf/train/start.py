"""A calibrated start: what a Trainer does before the first step of a ternary model."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import tqdm

from bitcore.errors import ArgumentError, ConfigError, LifecycleError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.fit.calibrate import CalibrationReport, Progress, calibrate, count_matrices
from bitlab_hf.fit.kept import LayerReport, OtherFitError
from bitlab_hf.fit.taps import tapped
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import decoder_layers, quantized_layers
from bitlab_hf.train.guard import calibration_folder
from bitlab_hf.train.recipe import Recipe
from bitlab_hf.train.stages import StagedCalibration
from bitlayers import BitLayerBase, set_quant_strength
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
    """

    recipe: Recipe
    calibration: CalibrationReport | None = None
    calibration_progress: Progress | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Calibrates, unless a run goes on, or has it done in stages; then trains."""
        model = self.accelerator.unwrap_model(self.model)
        wanted = self.recipe.calibration_samples and self.train_dataset is not None
        if not resume_from_checkpoint and self.is_world_process_zero():
            # An earlier run's.
            self._report_file.unlink(missing_ok=True)
        stages = self._stages(model, resume_from_checkpoint) if wanted else None
        if stages is not None:
            self.add_callback(stages)
        elif wanted and not resume_from_checkpoint:
            self.calibration = self._calibrate(model)
            if self.calibration is not None:
                self._report(self.calibration)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if stages is not None:
                self.remove_callback(stages)
                set_quant_strength(model, 1.0)
        if self.is_world_process_zero():
            shutil.rmtree(calibration_folder(self.args), ignore_errors=True)
        return result

    def _stages(self, model: Any, checkpoint: str | None) -> StagedCalibration | None:
        """Returns what calibrates in stages; None where it is to be done at once, or not at all."""
        recipe = self.recipe
        if recipe.stages == 1 or not _is_trainable(model) or not _has_decoder_layers(model):
            return None
        # Calibration in the midst of training meets weights that are sharded.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            if StagedCalibration.__name__ not in state.stateful_callbacks:
                return None
        elif not self._is_better_float(model):
            return None
        self.calibration = None
        return StagedCalibration(recipe.stages, recipe.stage_share, self._fit_stage)

    @torch.no_grad()
    def _is_better_float(self, model: Any) -> bool:
        """Tells whether the latent weights are those of a model in full precision."""
        batches = self._calibration_batches()[:_COMPARED]
        with self.accelerator.autocast():
            rounded = _loss(model, batches)
            with tapped(model) as (_, streams):
                full = _loss(model, batches, streams.calls.clear)
        if full < rounded:
            return True
        logger.warning(
            "BitLabTrainer: layers become ternary at once: the loss of %d examples is %.4f in full "
            "precision and %.4f ternary",
            sum(1 for batch in batches for _ in _rows(batch)),
            full,
            rounded,
        )
        return False

    @torch.no_grad()
    def _fit_stage(self, blocks: range) -> bool:
        """Calibrates decoder layers in the midst of training; tells whether it could."""
        model = self.accelerator.unwrap_model(self.model)
        samples = [row for batch in self._calibration_batches() for row in _rows(batch)]
        done: tuple[LayerReport, ...] = ()
        rounded: tuple[str, ...] = ()
        if self.calibration is not None:
            done, rounded = self.calibration.layers, self.calibration.rounded
        with self.accelerator.autocast(), self._calibration_bar() as progress:
            total = count_matrices(model)

            def advance(count: int, _total: int, name: str) -> None:
                progress(len(done) + 2 * len(rounded) + count, total, name)

            try:
                found = self._calibrate_kept(model, samples, advance, blocks)
            except (ArgumentError, ConfigError, LifecycleError) as error:
                logger.warning("BitLabTrainer: training goes on without calibration: %s", error)
                return False
        if self.accelerator.num_processes > 1:
            # Devices can round otherwise, and a code that comes out otherwise would stay so.
            for block in decoder_layers(model)[blocks.start : blocks.stop]:
                for parameter in block.parameters():
                    torch.distributed.broadcast(parameter.data, src=0)
        before = 0.0 if self.calibration is None else self.calibration.seconds
        self.calibration = replace(
            found,
            layers=done + found.layers,
            seconds=before + found.seconds,
            rounded=rounded + found.rounded,
        )
        self._report(found)
        return True

    @torch.no_grad()
    def _calibrate(self, model: Any) -> CalibrationReport | None:
        if not _is_trainable(model):
            return None
        layers: list[BitLayerBase | BitExperts] = [one.module for one in quantized_layers(model)]
        layers += [one.module for one in expert_modules(model)]
        if is_deepspeed_zero3_enabled():
            logger.warning(
                "BitLabTrainer: training starts without calibration: ZeRO-3 holds the weights in "
                "partitions\nCalibrate before with bitlab_hf.fit.calibrate, and save the model."
            )
            return None
        parameters = [one for layer in layers for one in layer.parameters(recurse=False)]
        before = [one.detach().clone() for one in parameters]
        batches = self._calibration_batches()
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
        self, model: Any, samples: list[Any], progress: Progress, blocks: range | None = None
    ) -> CalibrationReport:
        """Calibrates; goes on where a run that was killed has come to."""
        folder = calibration_folder(self.args)
        kept: dict[str, Any] = {"blocks": blocks, "folder": folder, "progress": progress}
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
        """Adds what was found to the run's report; warns of what keeps its rounding."""
        if found.rounded:
            logger.warning(
                "BitLabTrainer: %d experts keep their rounding, such as %s: no token of the "
                "calibration's examples reached them",
                len(found.rounded),
                found.rounded[0],
            )
        if not self.is_world_process_zero():
            return
        held: dict[str, Any] = {"layers": [], "rounded": []}
        with suppress(OSError, ValueError):
            # Of the stages before, also those of a run that goes on.
            held = json.loads(self._report_file.read_text(encoding="utf-8"))
        layers = {one["name"]: one for one in (*held["layers"], *map(asdict, found.layers))}
        content = {
            "mean_error": sum(one["error"] for one in layers.values()) / max(1, len(layers)),
            "layers": list(layers.values()),
            "rounded": list(dict.fromkeys((*held["rounded"], *found.rounded))),
        }
        write_atomically(self._report_file, json.dumps(content, indent=2) + "\n")

    def _calibration_batches(self) -> list[dict[str, Any]]:
        """Returns examples of the training data as the model takes them; draws from no generator
        that training draws from.
        """
        data: Any = self.train_dataset
        count = self.recipe.calibration_samples
        if isinstance(data, torch.utils.data.IterableDataset):
            rows = list(islice(iter(data), count))
        else:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            generator = torch.Generator().manual_seed(seed)
            # The sampler draws the same order, so these are what training comes to last: a layer
            # that was fitted to an example is nearer to the original there than elsewhere, and the
            # first steps would learn little.
            order = torch.randperm(len(data), generator=generator)[-count:]
            rows = [data[index] for index in order.tolist()]
        collate: Any = self._get_collator_with_removed_columns(self.data_collator)
        with torch.random.fork_rng(devices=()):
            parts = [collate(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
        return [dict(self._prepare_inputs(part)) for part in parts]

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


def _is_trainable(model: nn.Module) -> bool:
    """Tells whether there are latent layers or experts, and all of them learn."""
    layers = [one.module for one in quantized_layers(model) if not one.module.is_deployed]
    weights: list[Tensor | None] = [layer.weight for layer in layers]
    for found in expert_modules(model):
        weights += [found.module._parameters.get(name) for name in found.module.stacks]
    return bool(weights) and all(one is not None and one.requires_grad for one in weights)


def _has_decoder_layers(model: nn.Module) -> bool:
    try:
        return bool(decoder_layers(model))
    except ArgumentError:
        return False


def _loss(
    model: nn.Module, batches: list[dict[str, Any]], after: Callable[[], None] = lambda: None
) -> float:
    """Returns the mean loss of the batches in eval mode; NaN for a model that gives none.

    Args:
        model: Any.
        batches: What it is called with.
        after: Called after each.
    """
    training = model.training
    model.eval()
    losses = []
    try:
        for batch in batches:
            loss = getattr(model(**batch), "loss", None)
            losses.append(math.nan if loss is None else float(loss))
            after()
    finally:
        model.train(training)
    return sum(losses) / max(1, len(losses))
