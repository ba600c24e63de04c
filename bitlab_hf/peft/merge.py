"""Merging LoRA adapters into ternary layers: the sum is ternarized again, and the loss measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError, NonFiniteError
from bitcore.packing import pack_ternary
from bitcore.quantize import dequantize, group_scale, ternarize, two_levels
from bitlab_hf.peft.guard import own_norm
from bitlayers.base import BitLayerBase
from bitlayers.embedding import TernaryEmbedding
from bitlayers.int8 import Int8Rows
from bitlayers.rmsnorm import RMSNormBitLinear
from bitlayers.state import Packed

_ROUNDS = 10


@dataclass
class MergeResult:
    """A merged model and what ternarizing the sums has cost.

    Attributes:
        model: The base model with the adapters merged, no PEFT modules left.
        drift: By layer ``||Q - (W + D)|| / ||W + D||`` (Frobenius): W the ternary weight before,
            D the adapter's delta, Q the ternary weight after.
        kept: By layer the share of the delta that arrived, ``<Q - W, D> / <D, D>``: 1 if all of
            it did, 0 if none; NaN for a delta of zero.
        overall: The drift over all layers together.
        output: Relative Frobenius error of the logits on ``batches``, or None without batches.
    """

    model: Any
    drift: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    overall: float = 0.0
    output: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{name}: drift {self.drift[name]:.4f}, delta kept {self.kept[name]:.3f}"
            for name in self.drift
        ]
        lines.append(f"overall drift {self.overall:.4f}")
        if self.output is not None:
            lines.append(f"drift of the logits {self.output:.4f}")
        return "\n".join(lines)


@dataclass
class _Plan:
    """What is to become of one layer, computed before anything changes."""

    name: str
    layer: BitLayerBase
    packed: Packed | None
    weight: Tensor | None


@torch.no_grad()
def merge_and_requantize(
    peft_model: Any,
    scale: str = "fit",
    batches: Iterable[Mapping[str, Tensor]] = (),
    verbose: bool = True,
) -> MergeResult:
    """Merges the active LoRA adapters into ternary layers and measures what is lost.

    For each adapted layer ``W + D`` (ternary weight plus delta) is ternarized again and repacked. A
    ternary weight has no room for small changes: a delta below half a scale flips no code, so much
    of a small adapter is lost, and the drift says how much. Keep the adapter where that is too
    much. A latent layer gets the delta added to its latent weight, from which it ternarizes anew.
    Adapters on other layers are merged exactly, by PEFT.

    Everything is computed and checked first; an error leaves the model as it was.

    Args:
        peft_model: What ``get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        scale: For deployed layers: ``"fit"`` alternates between codes and least-squares scales
            from the old scales on, which never raises the Frobenius error (Ternary Weight
            Networks, arXiv 1605.04711, equation 3; scales of groups are brought to two levels each
            time); ``"keep"`` keeps the old scales.
        batches: Keyword arguments for the model, to measure the drift of the logits with.
        verbose: Whether to print the result.

    Returns:
        The merged base model and the drift.

    Raises:
        ArgumentTypeError: peft_model is no PEFT model.
        ArgumentError: scale is none of the two.
        LifecycleError: An adapter is no plain LoRA, is merged already, or no ternary layer has
            one; a weight is int8, sharded, or shared by two adapted layers.
        NonFiniteError: An adapter holds NaN or infinity.
    """
    if scale not in ("fit", "keep"):
        raise ArgumentError(f"merge_and_requantize: scale must be 'fit' or 'keep', got {scale!r}")
    if not hasattr(peft_model, "unload") or not hasattr(peft_model, "peft_config"):
        raise ArgumentTypeError(
            "merge_and_requantize: peft_model must be a PEFT model with LoRA adapters, got "
            f"{type(peft_model).__name__}\nLoad the adapter with PeftModel.from_pretrained(base, "
            "folder); a model with add_adapter can save its adapter for that."
        )
    adapted = _adapted(peft_model)
    result = MergeResult(None)
    plans, squares, others = [], [0.0, 0.0], []
    for name, module in adapted:
        delta = _delta(name, module)
        base = module.get_base_layer()
        if not isinstance(base, BitLayerBase):
            others.append(module)
            continue
        plan, before, after = _planned(name, base, delta, scale)
        plans.append(plan)
        target = before + delta
        error, norm = float((after - target).norm()), float(target.norm())
        squares = [squares[0] + error**2, squares[1] + norm**2]
        result.drift[name] = error / norm if norm else 0.0
        power = float((delta * delta).sum())
        moved = float(((after - before) * delta).sum())
        result.kept[name] = moved / power if power else float("nan")
    if not plans:
        raise LifecycleError(
            "merge_and_requantize: peft_model must have adapters on ternary layers, got none\n"
            "Use merge_and_unload()."
        )
    result.overall = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    batches = list(batches)
    training = peft_model.training
    expected = [peft_model.eval()(**batch).logits.float() for batch in batches]
    for module in others:
        module.merge()
    result.model = peft_model.unload()
    for plan in plans:
        if plan.packed is not None:
            plan.layer.commit_packed(*plan.packed)
        elif plan.weight is not None:
            plan.layer.weight.copy_(plan.weight)
            plan.layer.invalidate_cache()
    if batches:
        got = [result.model(**batch).logits.float() for batch in batches]
        error = sum(float((a - b).square().sum()) for a, b in zip(got, expected, strict=True))
        result.output = (error / sum(float(b.square().sum()) for b in expected)) ** 0.5
    result.model.train(training)
    if verbose:
        print(result)
    return result


def _adapted(peft_model: nn.Module) -> list[tuple[str, Any]]:
    """Returns the adapted layers by the base model's names, checked to be mergeable."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, Any]] = []
    # A head that is tied to a ternary embedding would be merged without it.
    seen = {id(one.qweight) for one in peft_model.modules() if isinstance(one, TernaryEmbedding)}
    for full, module in peft_model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        name = full.removeprefix("base_model.model.")
        problem = None
        if not isinstance(module, LoraLayer):
            problem = f"an adapter of another kind ({type(module).__name__})"
        elif module.merged:
            problem = "one that is merged already"
        elif any(adapter in module.lora_variant for adapter in module.active_adapters):
            problem = "a variant such as DoRA"
        elif any(module.lora_bias.get(adapter) for adapter in module.active_adapters):
            problem = "one with a bias (lora_bias)"
        if problem is not None:
            raise LifecycleError(
                f"merge_and_requantize: the adapter of {name} must be plain, unmerged LoRA, got "
                f"{problem}\nNothing was changed; keep the adapter, or train plain LoRA."
            )
        base = module.get_base_layer()
        if isinstance(base, (Int8Rows, TernaryEmbedding)):
            kind = "int8" if isinstance(base, Int8Rows) else "ternary"
            raise LifecycleError(
                f"merge_and_requantize: {name} must have a float weight, got {kind} rows\n"
                "Nothing was changed; keep the adapter unmerged."
            )
        if isinstance(base, RMSNormBitLinear):
            raise own_norm("merge_and_requantize", name)
        if isinstance(base, BitLayerBase):
            weight = base.qweight if base.is_deployed else base.weight
            if type(weight.data) is not Tensor or weight.is_meta:
                raise LifecycleError(
                    f"merge_and_requantize: {name} must be a whole tensor that holds data, got a "
                    "sharded or empty one\nSave the adapter and load it in one process."
                )
            if id(weight) in seen:
                raise LifecycleError(
                    f"merge_and_requantize: {name} must have a weight of its own, got one shared "
                    "with an embedding or another adapted layer\nKeep the adapter unmerged."
                )
            seen.add(id(weight))
        found.append((name, module))
    return found


def _delta(name: str, module: Any) -> Tensor:
    """Returns the sum of the active adapters' deltas in float32, in the weight's orientation."""
    known = (*module.lora_A, *module.lora_embedding_A)
    parts = [
        module.get_delta_weight(adapter).float()
        for adapter in module.active_adapters
        if adapter in known
    ]
    delta: Tensor = sum(parts[1:], parts[0]) if parts else torch.zeros(())
    if not bool(torch.isfinite(delta).all()):
        raise NonFiniteError(
            f"merge_and_requantize: the adapter of {name} must be finite, got NaN or infinity; "
            "nothing changed"
        )
    return delta


def _planned(
    name: str, layer: BitLayerBase, delta: Tensor, scale: str
) -> tuple[_Plan, Tensor, Tensor]:
    """Returns what is to be done, and the ternary weight before and after."""
    if layer.is_deployed:
        before = layer.dequantized_weight()
        delta = delta.to(before.device)
        codes, *new = _requantize(before + delta, *layer.packed()[1:], fit=scale == "fit")
        after = dequantize(codes, new[0], torch.float32, *new[1:])
        return _Plan(name, layer, (pack_ternary(codes), *new), None), before, after
    weight = layer.weight
    was_training = layer.training
    merged = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    try:
        layer.eval()
        before = layer.dequantized_weight()
        kept = weight.detach().clone()
        weight.copy_(merged)
        after = layer.dequantized_weight()
        weight.copy_(kept)
    finally:
        layer.train(was_training)
    return _Plan(name, layer, None, merged), before, after


def _requantize(
    target: Tensor, scale: Tensor, multiplier: Tensor | None = None, *, fit: bool
) -> tuple[Tensor, ...]:
    """Ternarizes a matrix, from given scales on.

    Args:
        target: float32 [N, K].
        scale: float32 [1], [N] or [N, K / G].
        multiplier: uint8 [N, K / G] beside a scale [N], or None.
        fit: Whether to alternate between codes and least-squares scales.

    Returns:
        codes int8 [N, K], the scales, and the multipliers where there are any. Each step lowers
        ``||codes * scale - target||`` or leaves it: rounding is the best choice of codes for a
        scale, ``<codes, target> / <codes, codes>`` the best scale for codes, and one that comes out
        worse in two levels is not taken. A scale without codes stays.
    """
    held = [scale.clone()] if multiplier is None else [scale.clone(), multiplier.clone()]
    step = scale if multiplier is None else group_scale(scale, multiplier)
    codes = ternarize(target, step)
    for _ in range(_ROUNDS if fit else 0):
        groups = (1, 1, -1) if step.numel() == 1 else (target.shape[0], step[0].numel(), -1)
        c, t = codes.double().view(groups), target.double().view(groups)
        power = (c * c).sum(-1)
        best = (c * t).sum(-1) / power.clamp(min=1)
        new = torch.where(power > 0, best.float(), step.view(best.shape)).view(step.shape)
        fitted = [new.clamp(min=torch.finfo(torch.float32).tiny)]
        if multiplier is not None:
            fitted = list(two_levels(fitted[0]))
        new = fitted[0] if multiplier is None else group_scale(fitted[0], fitted[1])
        if torch.equal(new, step):
            break
        again = ternarize(target, new)
        if multiplier is not None and _error(target, again, new) >= _error(target, codes, step):
            break
        step, codes, held = new, again, fitted
    return codes, *held


def _error(target: Tensor, codes: Tensor, step: Tensor) -> float:
    return float((dequantize(codes, step, torch.float32) - target).double().norm())
