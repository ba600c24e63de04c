"""Calibration: ternary weights that fit a few hundred samples, without training.

The model is walked block by block, and in each block group by group of layers that read the same
input. Two streams of activations run side by side: the original model's, and the one of the model
that is ternary up to here. Each layer's codes and scales are chosen so that its outputs in the
second stream are those of the first (`solve`), and become latent weights
(`latent`), from which training goes on or `deploy` packs.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.errors import ArgumentError, LifecycleError, NonFiniteError
from bitlab_hf.fit.confidence import fit_confidence
from bitlab_hf.fit.experts import fit_experts
from bitlab_hf.fit.kept import KeptLayers, LayerReport, fit_of, settings_of
from bitlab_hf.fit.latent import check_estimator
from bitlab_hf.fit.matrix import Matrix
from bitlab_hf.fit.room import Room
from bitlab_hf.fit.solve import Moments, damped, loss_of, solve, wanted_weight
from bitlab_hf.fit.streams import Originals, Unit, find_units
from bitlab_hf.fit.sums import SumFinder
from bitlab_hf.fit.taps import AnyTap, Batch, ExpertsTap, Tap, tapped
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, decoder_layers, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did.

    Attributes:
        layers: One entry for each calibrated layer, and for each matrix of an expert, in order.
        samples: How many there were.
        tokens: How many they hold.
        seconds: How long it took.
        rounded: The experts that keep the codes of their rounding, ``MODULE.NUMBER``: no token
            has reached them.
        logit_scale: What the last norm, and so the logits, were multiplied by.
    """

    layers: tuple[LayerReport, ...]
    samples: int
    tokens: int
    seconds: float
    rounded: tuple[str, ...] = ()
    logit_scale: float = 1.0

    def __str__(self) -> str:
        before = sum(layer.rounding_error for layer in self.layers) / len(self.layers)
        after = sum(layer.error for layer in self.layers) / len(self.layers)
        told = [
            f"{len(self.layers)} layers calibrated on {self.samples} samples ({self.tokens} "
            f"tokens) in {self.seconds:.0f} s; mean relative error of their outputs "
            f"{after:.3f}, rounded {before:.3f}"
        ]
        if self.logit_scale != 1:
            told.append(f"logits times {self.logit_scale:.2f}")
        if self.rounded:
            told.append(
                f"{len(self.rounded)} experts that no token reached keep their rounding, such as "
                f"{self.rounded[0]}"
            )
        return "; ".join(told)


@dataclass(frozen=True)
class _Numbers:
    """The arguments of `calibrate` that are numbers, checked."""

    batch_size: int
    damping: float
    rounds: int

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("rounds", self.rounds, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(
                    f"calibrate: {name} must be an int of at least {least}, got {value!r}"
                )
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping < math.inf:
            raise ArgumentError(
                f"calibrate: damping must be a number above 0, got {self.damping!r}"
            )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    samples: Iterable[Any],
    batch_size: int = 8,
    *,
    damping: float = 0.1,
    rounds: int = 4,
    blocks: range | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Chooses the ternary codes and scales of a latent model by what its layers, and its experts,
    get to see.

    The latent weights are replaced by ones that the model's own estimator ternarizes to these
    codes: train from there, or `deploy` at once. The last norm is multiplied by one factor, for
    which the next tokens' distribution is nearest to the original's (`confidence`), unless
    ``blocks`` leave some out.

    Args:
        model: A latent model from ``from_pretrained`` or `replace_linear`; changed in place.
        samples: Tokenized texts: dicts with ``input_ids`` (and perhaps ``attention_mask``), rows of
            a dataset, or integers [L]; those of less than two tokens are left out. A few hundred
            are enough.
        batch_size: Samples run at a time.
        damping: What is added to the diagonal of each Hessian, in units of its mean. A small one
            fits the samples, and on other text is worse.
        rounds: How often scales and codes are improved in turn, after GPTQ's pass.
        blocks: Which decoder layers, by number; the last one's come with what is outside of them.
            All others run as their ``quant_strength`` says, ternary at 1 and in full precision at
            0, and the layers are fitted to what they themselves give in such a model. None for
            the whole model, beside the original one.
        folder: Keeps what is found, layer by layer: a call with the same model, samples, blocks and
            settings goes on from there, to the same bits; calls for other blocks may share it.
            While less than a quarter of the memory is free, what the samples make of the model lies
            there, too. Remove it when it is no longer needed.
        progress: Called with layers done, layers in all and the layer's name.

    Returns:
        What was done, with each layer's error.

    Raises:
        ArgumentError: There are no samples of two tokens, or not of token ids; or the folder is of
            another fit (`bitlab_hf.fit.kept.OtherFitError`).
        ConfigError: The model's estimator cannot be inverted.
        DiskFullError: The folder's disk is full, for layers or for streams; the layers that it
            keeps stay.
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
    numbers = _Numbers(batch_size, damping, rounds)
    _check(inner)
    ids = _batches(samples, batch_size, next(inner.parameters()).device)
    layers = _decoder_layers(inner)
    wanted = _wanted(inner, layers, blocks)
    kept = None
    if folder is not None:
        settings, fit = settings_of(ids, asdict(numbers)), fit_of(inner, wanted, blocks)
        kept = KeptLayers(folder, settings, fit, writes=_is_first_process())
    reports: list[LayerReport] = []
    rounded: dict[str, None] = {}
    done = 0
    with tapped(inner, _left(inner, wanted), Room(folder)) as (taps, streams):
        finder = SumFinder(streams)
        units = find_units(inner, layers, blocks, ids, taps, streams)
        matrices = [matrix for unit, _ in units for tap in unit.taps for matrix in tap.matrices]
        if kept is not None:
            kept.check(matrices)
        for number, (unit, batches) in enumerate(units):
            originals = unit.originals(batches, finder)
            for group in originals.groups:
                found = _calibrate_group(group, unit, batches, originals, kept, numbers)
                for matrix, report in found:
                    done += 1
                    if report is None:
                        rounded[matrix.name.rpartition(".")[0]] = None
                    else:
                        reports.append(report)
                    if progress is not None:
                        progress(done, len(matrices), matrix.name)
            # What is outside of the blocks runs the whole model, from the token ids.
            if number + 1 < len(units) and not units[number + 1][0].whole:
                following = units[number + 1][1]
                ternary = unit.advance(batches)
                for batch, *pair in zip(following, originals.outputs, ternary, strict=True):
                    batch.original, batch.ternary = pair
            # The next block's are made beside nothing of this one.
            batches.clear()
        scale = 1.0
        if blocks in (None, range(len(layers))):
            scale = fit_confidence(inner, ids, streams)
        for module, tap in taps.items():
            if module in wanted:
                tap.commit()
    tokens = sum(part.numel() for part in ids)
    samples_run = sum(len(part) for part in ids)
    seconds = time.monotonic() - started
    return CalibrationReport(tuple(reports), samples_run, tokens, seconds, tuple(rounded), scale)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    try:
        return decoder_layers(model)
    except ArgumentError:
        return []


def _wanted(model: nn.Module, layers: list[nn.Module], blocks: range | None) -> set[nn.Module]:
    """Returns the modules that are calibrated with some decoder layers; None for all of them."""
    if blocks is None:
        return set(model.modules())
    wanted = {module for layer in layers[blocks.start : blocks.stop] for module in layer.modules()}
    if blocks.stop == len(layers):
        inside = {module for layer in layers for module in layer.modules()}
        wanted |= set(model.modules()) - inside
    return wanted


def _left(model: nn.Module, wanted: set[nn.Module]) -> set[nn.Module]:
    """Returns the quantized layers and experts that stay ternary while these are calibrated."""
    found: set[Any] = {one.module for one in find_modules(model, BitLayerBase)}
    found |= {one.module for one in expert_modules(model)}
    return {module for module in found - wanted if module.quant_strength == 1}


def _calibrate_group(
    group: list[AnyTap],
    unit: Unit,
    batches: list[Batch],
    originals: Originals,
    kept: KeptLayers | None,
    numbers: _Numbers,
) -> Iterator[tuple[Matrix, LayerReport | None]]:
    """Gives taps that read one tensor, or experts, their ternary weights, or those that are kept;
    the report is None of what keeps its rounding.
    """

    def solved(matrix: Matrix, moments: Moments) -> LayerReport:
        return _calibrate(matrix, moments, numbers)

    first = group[0]
    taps = [tap for tap in group if isinstance(tap, Tap)]
    if isinstance(first, ExpertsTap):
        yield from fit_experts(first, unit, batches, originals, kept, solved)
    elif kept is not None and kept.has(taps):
        yield from ((tap, kept.read(tap)) for tap in taps)
    else:
        moments = unit.moments(taps, batches, originals)
        for tap in taps:
            report = solved(tap, moments)
            if kept is not None:
                kept.write(tap, report)
            yield tap, report
    originals.inputs.pop(first, None)


def _calibrate(matrix: Matrix, moments: Moments, numbers: _Numbers) -> LayerReport:
    """Gives a matrix its ternary weight."""
    if not bool(torch.isfinite(moments.hessian.diagonal()).all()):
        raise NonFiniteError(
            f"calibrate: what {matrix.name} reads behind ternary layers must be finite, got NaN or "
            "infinity; nothing changed\n"
            "Calibrate in float32 or bfloat16, whose range is wide, or leave the layers before it "
            "in full precision: modules_to_not_convert."
        )
    target = wanted_weight(matrix.weight, moments, numbers.damping)
    leveled = matrix.config.granularity == "per_group"
    with damped(moments.hessian, numbers.damping) as hessian:
        codes, scales = matrix.joined(
            [
                solve(part, hessian, matrix.scale_shape(part), numbers.rounds, leveled)
                for part in matrix.split(target)
            ]
        )
        matrix.set(codes, scales)
        whole = loss_of(target, hessian)
        rounding_error = loss_of(target - matrix.rounding().double(), hessian)
        error = loss_of(target - codes * scales.full(), hessian)
    return LayerReport(
        name=matrix.name,
        rounding_error=rounding_error / whole if whole else 0.0,
        error=error / whole if whole else 0.0,
        zeros=float((codes == 0).double().mean()),
    )


def _check(model: nn.Module) -> None:
    """Checks the model before anything is run."""
    known = isinstance(model, nn.Module)
    layers: list[Found[Any]] = [*find_modules(model, BitLayerBase)] if known else []
    layers += expert_modules(model) if known else []
    if not layers:
        raise LifecycleError(
            "calibrate: model must hold quantized layers, got none\n"
            "Load it with quantization_config=BitLabConfig(), or call replace_linear(model)."
        )
    holders = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for found in layers:
        stacks = found.module.stacks if isinstance(found.module, BitExperts) else {}
        for leaf in stacks or ["weight"]:
            weight = found.module._parameters.get(leaf)
            _check_weight(f"{found.names[0]}.{leaf}", weight, holders)
            check_estimator(stacks[leaf].config if stacks else found.module.quant_config)


def _check_weight(name: str, weight: Tensor | None, holders: Mapping[int, int]) -> None:
    """Checks a latent weight; ``holders`` counts those that have it, by its id."""
    if weight is None:
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


def _is_first_process() -> bool:
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not spread or torch.distributed.get_rank() == 0


def _batches(samples: Any, batch_size: int, device: torch.device) -> list[Tensor]:
    """Returns token ids [B, L], samples of one length together, without padding."""
    given = [_tokens(sample) for sample in samples]
    # One token says nothing of what layers make of a text.
    rows = [row for row in given if len(row) > 1]
    if not rows:
        came = f"{len(given)} samples, all shorter" if given else "no samples"
        raise ArgumentError(
            f"calibrate: samples must hold texts of at least 2 tokens, got {came}\n"
            "Pass tokenized texts, such as blocks of 256 tokens: [tokenizer(text).input_ids, ...]."
        )
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
