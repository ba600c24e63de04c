"""Ternary statistics during training, through the Trainer's own logging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback

from bitcore.errors import ArgumentError
from bitcore.quantize import group_scale
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train.run_facts import run_facts
from bitlab_hf.train.statistics_files import RunFiles
from bitlab_hf.train.statistics_measure import (
    BINS,
    EDGE,
    InputWatch,
    changed_codes,
    code_counts,
    weight_histogram,
    whole_weights,
)
from bitlayers.base import BitLayerBase

PREFIX = "ternary/"
# One list each in the file, in the layers' order.
QUANTITIES = ("negative", "zero", "positive", "flipped", "scale", "saturated", "input_max")


class TernaryStatistics(TrainerCallback):
    """Logs what happens to the codes of every converted layer; works with any Trainer.

    ::

        trainer = Trainer(model=model, ...)          # or SFTTrainer, or a class of your own
        TernaryStatistics().attach(trainer)
        trainer.train()

    At every log each layer adds these to what the Trainer logs, as ``ternary/<layer>/<name>``, and
    over all layers as ``ternary/<name>``:

    - ``negative``, ``zero``, ``positive``: share of the codes -1, 0 and +1;
    - ``flipped``: share of the codes that differ from those of the last log (at the first log: from
      the start). After a resume the first one is left out, unless the checkpoint was made at a
      step that was logged;
    - ``scale``: mean of the layer's scales (not over all layers);
    - ``saturated``: share of activation codes at -127 or 127. Every token has at least one, so 1/K
      is the least;
    - ``input_max``: largest absolute value that entered the layer (over all layers: the largest).

    TensorBoard, W&B and other reporters get all of it. The terminal and ``trainer_state.json`` get
    the values over all layers only, because 7 values a layer would bury the loss; the layers'
    values are in the run's folder, in ``ternary_statistics.jsonl``. There too:
    ``ternary_histograms.json``, weights by size in scales, at the start, the end and evenly
    between.

    ``Trainer(callbacks=[TernaryStatistics()])`` works too, but a Trainer calls its reporters before
    the callbacks that it is given, so then TensorBoard and W&B see nothing of it; `attach` puts it
    in front of them.

    Cost: at a step that logs, one more packing of each weight and one more quantization of each
    input; nothing in between. Memory: 2 bits a weight on the weight's device. Weights are read
    after the optimizer's step. With several processes the weights are the same everywhere and
    process 0 counts them; inputs are those of process 0. FSDP2's shards are gathered one layer at a
    time; under the first FSDP and ZeRO-3 the weights' values are left out. With
    ``logging_strategy="epoch"`` the values of inputs are left out, because the step is not known
    beforehand. Compiled layers do not show their inputs either.

    Args:
        activations: Whether to watch the inputs of layers.
        histograms: How many histograms to take during training, 0 or at least 2.

    Raises:
        ArgumentError: histograms is 1 or negative.
    """

    def __init__(self, activations: bool = True, histograms: int = 5) -> None:
        if histograms < 0 or histograms == 1:
            raise ArgumentError(
                f"TernaryStatistics: histograms must be 0 or at least 2, got {histograms}"
            )
        self._activations, self._snapshots = activations, histograms
        self._attached = False
        self._before: list[dict[str, Any]] = []
        self._measured = self._interval = 0
        self._layers: dict[str, BitLayerBase] = {}
        self._codes: dict[str, Tensor] = {}
        self._watch: InputWatch | None = None
        self._files: RunFiles | None = None
        self._fresh: dict[str, list[float | None]] | None = None

    def attach(self, trainer: Trainer) -> TernaryStatistics:
        """Adds the callback to a Trainer, in front of its reporters and in place of another one of
        its kind; returns the callback.
        """
        callbacks = trainer.callback_handler.callbacks
        ours = TernaryStatistics, _KeepFromTerminal
        callbacks[:] = [one for one in callbacks if not isinstance(one, ours)]
        first = 1 + max(
            (i for i, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback)),
            default=-1,
        )
        callbacks.insert(first, self)
        printers = [
            i
            for i, one in enumerate(callbacks)
            if isinstance(one, PrinterCallback | ProgressCallback)
        ]
        callbacks.insert(min(printers, default=len(callbacks)), _KeepFromTerminal())
        self._attached = True
        return self

    # The Trainer's events.

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Finds the layers, remembers their codes, opens the files."""
        found = quantized_layers(model)
        self._layers = {one.names[0]: one.module for one in found if not one.module.is_deployed}
        if not self._layers:
            raise ArgumentError(
                "TernaryStatistics: model must have latent BitLab layers, got none\n"
                "Load it with quantization_config=BitLabConfig()."
            )
        main, step = state.is_world_process_zero, state.global_step
        self._fresh, self._files = None, None
        if main:
            facts = run_facts(model, args, state.max_steps)
            self._files = RunFiles(Path(args.output_dir), list(self._layers), step, facts)
            for logs in self._before if step == 0 else ():
                self._files.add(0, logs, {})
        self._before = []
        self._watch = InputWatch(self._layers) if main and self._activations else None
        # After a resume the codes of the last log are known only if that log was at this very step.
        # Every process packs, because gathering FSDP2's shards is a collective; what is of no use
        # is dropped afterwards.
        self._codes = {name: qweight for name, (_, qweight, _) in self._all_packed()}
        if step > 0 and (self._files is None or self._files.last_counted != step):
            self._codes = {}
        self._measured, self._interval = step, self._interval_of(state)
        if self._snapshots and step == 0:
            self._take_histograms(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the hooks on if this step is going to log."""
        if self._watch is not None and _will_log(args, state):
            self._watch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts, if this step logs; every process comes here with the same answer."""
        if self._watch is not None:
            self._watch.stop()
        self._count_if_logging(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts, if the end of the epoch logs."""
        self._count_if_logging(state, control)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the values to the log and to the file."""
        if logs is None or not state.is_world_process_zero:
            return
        if self._files is None:
            # An evaluation before training; the folder is opened when training begins.
            self._before.append(dict(logs))
            return
        values, self._fresh = self._fresh or {}, None
        self._files.add(state.global_step, logs, values)
        if not values:
            return
        totals = self._totals(values)
        if state.log_history and state.log_history[-1]["step"] == state.global_step:
            state.log_history[-1].update(totals)
        logs.update(totals)
        if not self._attached:
            return
        for quantity, row in values.items():
            for name, value in zip(self._layers, row, strict=True):
                if value is not None:
                    logs[f"{PREFIX}{name}/{quantity}"] = value

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the last histograms and lets go of what it held."""
        if self._snapshots:
            self._take_histograms(state.global_step)
        if self._watch is not None:
            self._watch.stop()
        self._codes = {}

    # Counting.

    def _interval_of(self, state: Any) -> int:
        """Returns how many of the parts between two histograms are over."""
        return int(state.global_step * (self._snapshots - 1) // max(1, state.max_steps))

    def _count_if_logging(self, state: Any, control: Any) -> None:
        if not control.should_log or self._measured == state.global_step:
            return
        self._measured = state.global_step
        self._fresh = self._measure(state.is_world_process_zero)
        # By steps alone, so that all processes gather the weights at the same time.
        interval = self._interval_of(state)
        if self._snapshots and self._interval < interval < self._snapshots - 1:
            self._take_histograms(state.global_step)
        self._interval = interval

    def _packed(self, layer: BitLayerBase, main: bool) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns weight, packed codes and scale (one a group, if grouped); None where another
        process or sharding has them.

        Every process has to call it for every layer.
        """
        with whole_weights(layer) as there, torch.no_grad():
            if not (main and there):
                return None
            packed = layer.build_deployment()
            if not isinstance(packed, tuple):
                # One that packs itself has no codes to count.
                return None
            qweight, scale, *multiplier = packed
            scale = group_scale(scale, multiplier[0]) if multiplier else scale
            return layer.weight.detach(), qweight, scale

    def _all_packed(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
        """Yields the layers that this process sees whole, with what `_packed` gives."""
        for name, layer in self._layers.items():
            found = self._packed(layer, self._files is not None)
            if found is not None:
                yield name, found

    def _measure(self, main: bool) -> dict[str, list[float | None]]:
        """Returns one list a quantity; packs every layer and keeps its codes."""
        values: dict[str, list[float | None]] = {quantity: [] for quantity in QUANTITIES}
        for name, layer in self._layers.items():
            found = self._packed(layer, main)
            if not main:
                continue
            one: dict[str, float | None] = dict.fromkeys(QUANTITIES)
            if found is not None:
                _, qweight, scale = found
                counts = code_counts(qweight, layer.out_features)
                shares = (counts / counts.sum()).tolist()
                one |= dict(zip(QUANTITIES[:3], shares, strict=True))
                before = self._codes.get(name)
                if before is not None:
                    one["flipped"] = changed_codes(before, qweight) / int(counts.sum())
                one["scale"] = float(scale.float().mean())
                self._codes[name] = qweight
            if self._watch is not None:
                one["saturated"], one["input_max"] = self._watch.read(name)
            for quantity, value in one.items():
                values[quantity].append(value)
        return values

    def _take_histograms(self, step: int) -> None:
        counts = {name: weight_histogram(*found) for name, found in self._all_packed()}
        if self._files is not None:
            self._files.add_histograms(step, {"edge": EDGE, "bins": BINS}, counts)

    def _totals(self, values: dict[str, list[float | None]]) -> dict[str, float]:
        """Returns the values over all layers: weighted by size, the largest input, plain means."""
        sizes = [layer.out_features * layer.in_features for layer in self._layers.values()]
        totals = {}
        for quantity, row in values.items():
            pairs = [(value, size) for value, size in zip(row, sizes, strict=True)
                     if value is not None]  # fmt: skip
            if not pairs or quantity == "scale":
                continue
            if quantity == "input_max":
                total = max(value for value, _ in pairs)
            elif quantity == "saturated":
                total = sum(value for value, _ in pairs) / len(pairs)
            else:
                total = sum(v * size for v, size in pairs) / sum(size for _, size in pairs)
            if math.isfinite(total):
                totals[PREFIX + quantity] = total
        return totals


class _KeepFromTerminal(TrainerCallback):
    """Takes the layers' values out of the log, after the reporters and before it is printed."""

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in [name for name in logs or () if _is_of_layer(name)]:
            del logs[name]  # type: ignore[union-attr]


def _is_of_layer(name: str) -> bool:
    return name.startswith(PREFIX) and "/" in name.removeprefix(PREFIX)


def _will_log(args: Any, state: Any) -> bool:
    """Whether the Trainer's default flow logs after the step that begins."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    return bool(args.logging_strategy == "steps" and step % state.logging_steps == 0)
