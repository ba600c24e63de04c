"""Distillation losses, each a mean over the positions that count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Rows of logits at a time: float32 copies of them stay small beside the logits themselves.
_CHUNK = 512
# On a CPU so many values a thread: they stay in its caches, which is eight times faster.
_CPU_CHUNK = 1 << 18


# Of some rows and the logarithms of the student's probabilities there, at the temperature: the sum
# of their divergences, and its gradient by the student's logits, those divided by the temperature.
Divergence = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


class _SumOfRows(torch.autograd.Function):
    """Sum of a divergence over rows, with the gradient computed on the way.

    Autograd alone would keep several float32 tensors of the logits' size until the backward pass;
    this keeps one, in the student's dtype.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student)
        chunk = _CHUNK
        if student.device.type == "cpu":
            values = _CPU_CHUNK * torch.get_num_threads()
            chunk = max(1, values // max(1, student.shape[-1]))
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            log_q = (student[rows].float() / temperature).log_softmax(-1)
            part, difference = divergence(rows, log_q)
            total += part
            gradient[rows] = (difference / temperature).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def _mean_of_rows(student: Tensor, temperature: float, divergence: Divergence) -> Tensor:
    total: Tensor = _SumOfRows.apply(student, temperature, divergence)
    return total * temperature**2 / max(len(student), 1)


def logits_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the mean over rows of ``T^2 KL(softmax(teacher / T) || softmax(student / T))``.

    Args:
        student: Logits [n, V], any float dtype.
        teacher: Logits [n, V]; no gradient.
        temperature: T.

    Source: Hinton et al., arXiv 1503.02531.
    """

    def divergence(rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (teacher[rows].float() / temperature).log_softmax(-1)
        p = log_p.exp()
        # A probability of 0 has the logarithm -inf; its share of the divergence is 0.
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(), log_q.exp() - p

    return _mean_of_rows(student, temperature, divergence)


def top_divergence(
    student: Tensor, indices: Tensor, top: Tensor, rest: Tensor, temperature: float = 1.0
) -> Tensor:
    """Returns `logits_divergence` over the teacher's likeliest tokens, all others being one.

    With all tokens given it is `logits_divergence`; with fewer, a lower bound of it.

    Args:
        student: Logits [n, V], any float dtype.
        indices: int64 [n, k], tokens.
        top: float32 [n, k], the teacher's probabilities of them at this temperature.
        rest: float32 [n], its probability of all others.
        temperature: T.
    """

    def divergence(rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        index, p, p_rest = indices[rows], top[rows], rest[rows]
        log_q_top = log_q.gather(-1, index)
        log_q_rest = log_q.scatter(-1, index, -torch.inf).logsumexp(-1)
        of_top = torch.where(p > 0, p * (p.log() - log_q_top), 0.0).sum()
        of_rest = torch.where(p_rest > 0, p_rest * (p_rest.log() - log_q_rest), 0.0).sum()
        # The rest's probability, shared out as the student shares its own.
        share = torch.where(p_rest > 0, (p_rest.log() - log_q_rest).exp(), 0.0)
        difference = log_q.exp() * (1 - share)[:, None]
        return of_top + of_rest, difference.scatter_(-1, index, log_q_top.exp() - p)

    return _mean_of_rows(student, temperature, divergence)


def hidden_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean of ``|student - teacher|^2 / |teacher|^2`` over hidden states [n, H]."""
    target = teacher.float()
    differences = (student.float() - target).pow(2).sum(-1)
    ratios = differences / target.pow(2).sum(-1).clamp(min=1e-12)
    return ratios.sum() / max(len(student), 1)


def relation_divergence(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Returns the mean KL between the relations of tokens in teacher and student.

    With A [L, d] the states of a head, row t of ``softmax(A A^T / sqrt(d))`` says how token t
    relates to the others. Padding takes part on neither side.

    Args:
        student: States [B, L, D_s]; D_s must be a multiple of heads.
        teacher: States [B, L, D_t]; D_t may differ from D_s.
        mask: bool [B, L], True where a token is.
        heads: Relation heads.

    Source: MiniLMv2, arXiv 2012.15828, equations 3 to 5; BitNet Distillation, arXiv 2510.13998.
    """
    log_q, log_p = (_relations(states, mask, heads) for states in (student, teacher))
    pairs = torch.where(mask[:, None, None, :], log_p.exp() * (log_p - log_q), 0.0)
    rows = pairs.sum(-1).mean(1)
    return rows[mask].sum() / mask.sum().clamp(min=1)


def _relations(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    batch, length, width = states.shape
    split = states.float().view(batch, length, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    # Not -inf: rows of padding would be NaN.
    return scores.masked_fill(~mask[:, None, None, :], -1e9).log_softmax(-1)


def balancing_weight(config: Any) -> float:
    """Returns by what a mixture multiplies the loss of its routers, ``aux_loss`` of its output.

    Args:
        config: The model's configuration.
    """
    text = config.get_text_config()
    for holder, name in (
        (text, "router_aux_loss_coef"),
        (text, "aux_loss_coef"),
        (getattr(text, "ffn_config", None), "moe_loss_weight"),
    ):
        if hasattr(holder, name):
            return float(getattr(holder, name))
    return 0.0
