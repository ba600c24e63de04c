"""How sure of the next token a calibrated model is: no surer than it can be.

The last norm brings what layers have put wrong to the size of the rest, so that logits are as large
as the original's, and say less. One factor for all of them, in that norm's weight, is all that is
fitted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitlab_hf.fit.streams import Unit, whole_calls
from bitlab_hf.fit.taps import Batch, Streams
from bitlayers.base import BitLayerBase

# One number takes no more.
_TOKENS = 4096
# Octaves from a half to 1.4 in eighths; between them the loss is a parabola.
_EXPONENTS = [eighth / 8 for eighth in range(-8, 5)]
# Logits that are held at a time.
_ELEMENTS = 2**22


@dataclass
class _Pass:
    """What a pass through the whole model ended with.

    Attributes:
        states: The base model's last hidden states [B, L, H].
        norm: The module that made them; None if it is none that could be scaled.
        inputs: What it was given.
        logits: Of the last token of each row, at least, [B, ..., V].
    """

    states: Tensor
    norm: nn.Module | None
    inputs: Tensor | None
    logits: Tensor


def fit_confidence(model: Any, ids: list[Tensor], streams: Streams) -> float:
    """Scales the last norm of a model whose ternary weights are known, so that its next tokens'
    distribution is nearest to the original's.

    Args:
        model: The model.
        ids: Token ids [B, L] of batches; some 4096 tokens of them are looked at.
        streams: Those of the taps in it.

    Returns:
        The factor, 0.5 to 1.41. 1 where nothing changed: the model predicts no tokens, or what
        makes its logits is not a norm, a head and a factor or soft cap, or the norm is not one that
        weights scale, is shared, or is frozen while others train, or logits are not finite.

    Source: temperature scaling, arXiv 1706.04599, towards the original's distribution (KL) instead
        of labels.
    """
    finds = getattr(model, "get_output_embeddings", None)
    head = None if finds is None else finds()
    base = getattr(model, "base_model", model)
    if head is None or base is model or getattr(model.config, "is_encoder_decoder", False):
        return 1.0
    unit = Unit(model, [], streams, whole=True)
    few = whole_calls(model, _few(ids), with_logits=False)
    originals = [_run(unit, base, batch, streams, original=True) for batch in few]
    first = originals[0]
    if first is None or first.norm is None or first.inputs is None:
        return 1.0
    streams.original = True
    shown = _shown(model.config, head(first.states[:, -1]), first.logits[:, -1])
    shift = _shift(first.norm, first.inputs)
    if shown is None or shift is None or not _may_change(model, first.norm):
        return 1.0
    losses = torch.zeros(len(_EXPONENTS), dtype=torch.float64)
    for batch, original in zip(few, originals, strict=True):
        ternary = _run(unit, base, batch, streams, original=False)
        if original is None or ternary is None:
            return 1.0
        losses += _losses(head, shown, original.states, ternary.states, streams)
    if not bool(losses.isfinite().all()):
        return 1.0
    factor = float(2 ** _lowest(losses))
    _scale(first.norm, factor, shift)
    return factor


def _few(ids: list[Tensor]) -> list[Tensor]:
    """Returns rows that have tokens enough, one by one."""
    rows: list[Tensor] = []
    for row in (row for part in ids for row in part.split(1)):
        if sum(map(torch.numel, rows)) >= _TOKENS:
            break
        rows.append(row)
    return rows


def _run(
    unit: Unit, base: nn.Module, batch: Batch, streams: Streams, original: bool
) -> _Pass | None:
    """Runs all of the model; None where it gives no hidden states or logits."""
    states: list[Any] = []
    calls: Counter[nn.Module] = Counter()
    last: list[Any] = [None, None, None]

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        last[:] = module, args[0] if args else None, output

    own = [module for module in base.modules() if module._parameters and module is not base]
    with _hooks([*((one, note) for one in own)]), _hooks([(base, lambda *a: states.append(a[2]))]):
        output = unit.run(batch, original)
    found = getattr(states[0], "last_hidden_state", None) if states else None
    logits = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not isinstance(logits, Tensor) or logits.dim() != 3:
        return None
    module, inputs, made = last
    scalable = made is found and calls[module] == 1 and not isinstance(module, BitLayerBase)
    if not scalable:
        module = inputs = None
    return _Pass(found, module, inputs, logits)


@contextmanager
def _hooks(wanted: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(config: Any, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Returns what a model makes of its head's outputs, from an example of both [B, V]."""
    raw, logits = raw.float(), logits.float()
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    factor = float((raw * logits).sum() / raw.square().sum().clamp(min=1e-20))
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x * factor]
    if cap:
        ways.append(lambda x: torch.tanh(x / cap) * cap)
    size = logits.abs().mean()
    near = (way for way in ways if bool((way(raw) - logits).abs().mean() < 0.01 * size))
    return next(near, None)


def _shift(norm: nn.Module, inputs: Tensor) -> float | None:
    """Returns what a norm adds to its weight before it multiplies by it: 0, or 1 as Gemma's; None
    of a module that is not scaled by its parameters.
    """
    held = [value.clone() for value in norm.parameters(recurse=False)]
    wanted = norm(inputs).float() / 2
    for shift in (0.0, 1.0):
        _scale(norm, 0.5, shift)
        got = norm(inputs).float()
        for value, before in zip(norm.parameters(recurse=False), held, strict=True):
            value.copy_(before)
        if bool((got - wanted).abs().mean() < 0.01 * wanted.abs().mean()):
            return shift
    return None


def _scale(norm: nn.Module, factor: float, shift: float) -> None:
    for name, value in norm.named_parameters(recurse=False):
        added = 0.0 if name.endswith("bias") else shift
        value.copy_((value.double() + added) * factor - added)


def _may_change(model: nn.Module, norm: nn.Module) -> bool:
    """Tells whether no other module has a norm's parameters, and they train where others do."""
    own = list(norm.parameters(recurse=False))
    held = {id(value) for value in own}
    others = [
        value
        for module in model.modules()
        if module is not norm
        for value in module._parameters.values()
        if value is not None
    ]
    is_frozen = not any(value.requires_grad for value in own)
    return not any(id(value) in held for value in others) and not (
        is_frozen and any(value.requires_grad for value in others)
    )


def _losses(
    head: Any,
    shown: Callable[[Tensor], Tensor],
    original: Tensor,
    ternary: Tensor,
    streams: Streams,
) -> Tensor:
    """Returns the cross-entropy from the original's distribution for each factor, summed over
    tokens, float64 [factors].

    Args:
        head: Makes logits of hidden states.
        shown: What the model makes of these.
        original: Hidden states [B, L, H].
        ternary: Those of the ternary model, likewise.
        streams: The taps', of which the head may be one.
    """
    bias = getattr(head, "bias", None)
    added = 0.0 if bias is None else bias.float()
    rows = max(1, _ELEMENTS // head(ternary[:1, -1]).shape[-1])
    losses = torch.zeros(len(_EXPONENTS), dtype=torch.float64)
    pairs = (states.flatten(0, -2).split(rows) for states in (original, ternary))
    for wanted, states in zip(*pairs, strict=True):
        streams.original = True
        share = shown(head(wanted).float()).softmax(-1)
        streams.original = False
        raw = head(states).float() - added
        for index, exponent in enumerate(_EXPONENTS):
            logits = shown(raw * 2**exponent + added)
            loss = logits.logsumexp(-1) - (share * logits).sum(-1)
            losses[index] += loss.sum().double().cpu()
    return losses


def _lowest(losses: Tensor) -> float:
    """Returns the exponent of least loss, from the parabola through the lowest point and those
    beside it.
    """
    best = int(losses.argmin())
    if not 0 < best < len(_EXPONENTS) - 1:
        return _EXPONENTS[best]
    left, middle, right = (float(value) for value in losses[best - 1 : best + 2])
    step = _EXPONENTS[1] - _EXPONENTS[0]
    return _EXPONENTS[best] + step * (left - right) / (2 * (left - 2 * middle + right))
