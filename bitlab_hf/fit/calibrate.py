"""Calibration: ternary weights that fit a few hundred samples, without training.

The model is walked block by block, and in each block group by group of layers that read the same
input. Two streams of activations run side by side: the original model's, and the one of the model
that is ternary up to here. Each layer's codes and scales are chosen so that its outputs in the
second stream are those of the first (`solve`), and become latent weights
(`latent`), from which training goes on or `deploy` packs.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.errors import ArgumentError, LifecycleError, NonFiniteError
from bitlab_hf.fit.latent import check_estimator
from bitlab_hf.fit.solve import Moments, damped, loss_of, solve, wanted_weight
from bitlab_hf.fit.streams import find_units
from bitlab_hf.fit.sums import SumFinder
from bitlab_hf.fit.taps import Tap, tapped
from bitlab_hf.model.tree import decoder_layers, find_modules
from bitlayers.base import BitLayerBase

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LayerReport:
    """What calibration did to a layer.

    Attributes:
        name: Of the layer.
        rounding_error: ``|Y - Y_t|^2 / |Y|^2`` over the calibration tokens if its weight were
            rounded: Y the wanted outputs, Y_t the ternary ones.
        error: The same, calibrated.
        zeros: Share of codes 0.
    """

    name: str
    rounding_error: float
    error: float
    zeros: float


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        layers: One entry for each calibrated layer, in order.
        samples: How many there were.
        tokens: How many they hold.
        seconds: How long it took.
    """

    layers: tuple[LayerReport, ...]
    samples: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        before = sum(layer.rounding_error for layer in self.layers) / len(self.layers)
        after = sum(layer.error for layer in self.layers) / len(self.layers)
        return (
            f"{len(self.layers)} layers calibrated on {self.samples} samples ({self.tokens} "
            f"tokens) in {self.seconds:.0f} s; mean relative error of their outputs "
            f"{after:.3f}, rounded {before:.3f}"
        )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    batch_size: int = 8,
    *,
    damping: float = 0.1,
    rounds: int = 4,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Chooses the ternary codes and scales of a latent model by what its layers get to see.

    The latent weights are replaced by ones that the model's own estimator ternarizes to these
    codes: train from there, or `deploy` at once.

    Args:
        model: A latent model from ``from_pretrained`` or `replace_linear`; changed in place.
        samples: Tokenized texts: dicts with ``input_ids`` (and perhaps ``attention_mask``), rows of
            a dataset, or integers [L]. A few hundred are enough.
        batch_size: Samples run at a time.
        damping: What is added to the diagonal of each Hessian, in units of its mean. A small one
            fits the samples, and on other text is worse.
        rounds: How often scales and codes are improved in turn, after GPTQ's pass.
        progress: Called with layers done, layers in all and the layer's name.

    Returns:
        What was done, with each layer's error.

    Raises:
        ArgumentError: There are no samples, or not of token ids.
        ConfigError: The model's estimator cannot be inverted.
        LifecycleError: The model is not latent, or its weights are sharded or shared.
        NonFiniteError: A weight, or an activation, holds NaN or infinity.

    Numerics:
        Moments are added up in float64 and solved in it; one input's Hessians are held at a time.
        The results do not depend on ``batch_size`` but for rounding. Under autocast the streams run
        in its dtype. Beside the model there are two streams of all tokens, and what the layers of
        one block read.

    Source: GPTQ, arXiv 2210.17323, with the targets of GPTAQ, arXiv 2504.02692, and coordinate
        descent as in QuantEase, arXiv 2309.01885. That a layer whose output is added to the
        residual stream also takes back what stands wrong there is BitLab's own.
    """
    started = time.monotonic()
    inner: nn.Module = getattr(model, "_orig_mod", model)
    _check_numbers(batch_size, damping, rounds)
    _check(inner)
    ids = _batches(samples, batch_size, next(inner.parameters()).device)
    reports: list[LayerReport] = []
    with tapped(inner) as (taps, streams):
        try:
            blocks = decoder_layers(inner)
        except ArgumentError:
            blocks = []
        finder = SumFinder(streams)
        units = find_units(inner, blocks, ids, taps, streams)
        for number, (unit, batches) in enumerate(units):
            originals = unit.originals(batches, finder)
            for group in originals.groups:
                moments = unit.moments(group, batches, originals)
                originals.inputs.pop(group[0], None)
                for tap in group:
                    reports.append(_calibrate(tap, moments, damping, rounds))
                    if progress is not None:
                        progress(len(reports), len(taps), tap.name)
            # What is outside of the blocks runs the whole model, from the token ids.
            if number + 1 < len(units) and not units[number + 1][0].whole:
                following = units[number + 1][1]
                ternary = unit.advance(batches)
                for batch, *pair in zip(following, originals.outputs, ternary, strict=True):
                    batch.original, batch.ternary = pair
            # The next block's are made beside nothing of this one.
            batches.clear()
        for tap in taps.values():
            tap.commit()
    tokens = sum(part.numel() for part in ids)
    return CalibrationReport(
        tuple(reports), sum(len(part) for part in ids), tokens, time.monotonic() - started
    )


def _calibrate(tap: Tap, moments: Moments, damping: float, rounds: int) -> LayerReport:
    """Gives a tap its ternary weight."""
    layer = tap.layer
    hessian = damped(moments.hessian, damping)
    target = wanted_weight(layer.weight, moments, damping)
    rows, *groups = layer.estimated_shape()
    leveled = layer.quant_config.granularity == "per_group"
    codes, scales = solve(target, hessian, (rows, math.prod(groups)), rounds, leveled)
    tap.set(codes, scales)
    whole = float(((target @ hessian) * target).sum())
    roundings = layer.dequantized_weight().double()
    return LayerReport(
        name=tap.name,
        rounding_error=loss_of(target - roundings, hessian) / whole if whole else 0.0,
        error=loss_of(target - codes * scales.full(), hessian) / whole if whole else 0.0,
        zeros=float((codes == 0).double().mean()),
    )


def _check_numbers(batch_size: int, damping: float, rounds: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("rounds", rounds, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(
                f"calibrate: {name} must be an int of at least {least}, got {value!r}"
            )
    if not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
        raise ArgumentError(f"calibrate: damping must be a number above 0, got {damping!r}")


def _check(model: nn.Module) -> None:
    """Checks the model before anything is run."""
    layers = find_modules(model, BitLayerBase) if isinstance(model, nn.Module) else []
    if not layers:
        raise LifecycleError(
            "calibrate: model must hold quantized layers, got none\n"
            "Load it with quantization_config=BitLabConfig(), or call replace_linear(model)."
        )
    holders = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for found in layers:
        name, weight = f"{found.names[0]}.weight", found.module._parameters.get("weight")
        if found.module.is_deployed or weight is None:
            raise LifecycleError(
                f"calibrate: {name} must be latent, got a layer that is deployed\n"
                "Calibrate the latent model, then deploy it."
            )
        if type(weight.data) is not Tensor or weight.is_meta:
            raise LifecycleError(
                f"calibrate: {name} must be a whole tensor with data, got a sharded or meta one"
            )
        if holders[id(weight)] > 1:
            raise LifecycleError(
                f"calibrate: {name} must belong to one module, got one that is shared or tied"
            )
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"calibrate: {name} must be finite, got NaN or infinity")
        check_estimator(found.module.quant_config)


def _batches(samples: Any, batch_size: int, device: torch.device) -> list[Tensor]:
    """Returns token ids [B, L], samples of one length together, without padding."""
    rows = [_tokens(sample) for sample in samples]
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ArgumentError("calibrate: samples must hold tokens, got none")
    lengths: dict[int, list[Tensor]] = {}
    for row in rows:
        lengths.setdefault(len(row), []).append(row)
    return [
        torch.stack(same[first : first + batch_size]).to(device)
        for same in lengths.values()
        for first in range(0, len(same), batch_size)
    ]


def _tokens(sample: Any) -> Tensor:
    """Returns the token ids of a sample [L], without those that its attention mask hides."""
    mask = None
    if isinstance(sample, Mapping):
        if "input_ids" not in sample:
            raise ArgumentError(
                f"calibrate: samples must have input_ids, got one with {sorted(sample)}\n"
                "Tokenize the text first."
            )
        mask, sample = sample.get("attention_mask"), sample["input_ids"]
    try:
        ids = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"calibrate: samples must be token ids, got {type(sample).__name__}: {error}"
        ) from error
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.numel() == 0:
        return ids.new_empty(0).long()
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ArgumentError(
            f"calibrate: each sample must be integers [L], got {ids.dtype} {list(ids.shape)}"
        )
    if mask is not None:
        ids = ids[torch.as_tensor(mask).reshape(ids.shape).bool()]
    return ids.long()
