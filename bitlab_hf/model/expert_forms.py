"""Experts that a class keeps in another way than transformers' decorator knows: how their tensors
lie, and how the ternary module runs them.

One entry a class. What is not said here, the life of the experts, is that of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitlayers.experts import BitExperts
from bitlayers.projection import Projection
from bitlayers.routing import Routing
from bitlayers.stack import Stack

# A stack but for how it is quantized.
Layout = partial[Stack]


class GatedExperts(BitExperts):
    """Experts of a class without the decorator: its activation is between gate and up."""

    has_gate, has_post_expert_norm = True, False

    def activated(self, *inner: Tensor) -> Tensor:
        """See `BitExperts`."""
        gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
        return self.act_fn(gate) * up


class ExpertsOfAnotherForward(GatedExperts):
    """Experts whose tensors are in a module of their own, and run by the one that holds it
    (dbrx).
    """

    activation_fn: Callable[[Tensor], Tensor]

    def activated(self, *inner: Tensor) -> Tensor:
        """See `BitExperts`."""
        gate, up = inner
        return self.activation_fn(gate) * up

    def routed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the module's tokens in any shape, and what its forward is given with them."""
        return hidden_states.reshape(-1, hidden_states.shape[-1]), *args

    def through(
        self, projections: Sequence[Projection], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns [M, tokens, H] for hidden_states of the length M."""
        total: Tensor = super().through(projections, hidden_states, *args, **kwargs)
        rows = len(hidden_states)
        return total.view(rows, len(total) // max(rows, 1), total.shape[-1])


class ExpertsWithIdentities(GatedExperts):
    """Experts of which those above the number of matrices give back what they get (longcat)."""

    def through(
        self, projections: Sequence[Projection], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Adds the tokens, by the weights of the experts that compute nothing."""
        total: Tensor = super().through(projections, hidden_states, *args, **kwargs)
        index, weights = args
        same = weights.masked_fill(index < self.num_experts, 0).sum(-1, keepdim=True)
        given: Tensor = hidden_states * same
        return total + given.to(total.dtype)


class ExpertsOfEveryToken(GatedExperts):
    """Experts that are given every token, zeros where it is none of theirs (llama4)."""

    keeps_tokens = False

    def routed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes all tokens for the first expert, then all for the next one, [E M, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        numbers = torch.arange(self.num_experts, device=tokens.device)
        numbers = numbers.repeat_interleave(len(tokens) // self.num_experts)
        # Zeros become zeros, in a product without bias and between two of them: nobody needs to
        # compute them.
        index = numbers.masked_fill(~tokens.ne(0).any(-1), self.num_experts).unsqueeze(1)
        return tokens, index, tokens.new_ones(index.shape)


class ExpertsOfSortedTokens(BitExperts):
    """One projection of experts whose tokens were sorted by whoever calls it (jetmoe)."""

    has_gate, has_post_expert_norm, keeps_tokens = False, False, False

    def activated(self, *inner: Tensor) -> Tensor:
        """There is nothing in front of the only projection."""
        raise NotImplementedError

    def routed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes tokens one expert after the other, and how many each has."""
        (sizes,) = args
        counts = torch.as_tensor(sizes, device=hidden_states.device)
        index = torch.arange(self.num_experts, device=hidden_states.device)
        index = index.repeat_interleave(counts).unsqueeze(1)
        return hidden_states, index, hidden_states.new_ones(index.shape)

    def through(
        self, projections: Sequence[Projection], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns [M, N]."""
        (only,), (tokens, index, _) = projections, self.routed(hidden_states, *args, **kwargs)
        return only(tokens, Routing(index, self.num_experts))


class SharedExperts(GatedExperts):
    """Experts that all get every token, weighted in front of the last projection (inkling)."""

    def routed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes tokens in any shape and each expert's weight of them, ``gammas``."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = torch.arange(self.num_experts, device=tokens.device).repeat(len(tokens), 1)
        (gammas,) = (*args, *kwargs.values())
        return tokens, index, gammas.reshape(index.shape)

    def through(
        self, projections: Sequence[Projection], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Returns the sum in the shape and dtype of hidden_states."""
        tokens, index, weights = self.routed(hidden_states, *args, **kwargs)
        routing = Routing(index, self.num_experts)
        *firsts, last = projections
        inner = self.activated(*(one(tokens, routing) for one in firsts))
        outer = last(inner * weights.reshape(-1, 1), routing)
        total = outer.float().view(*index.shape, outer.shape[-1]).sum(1)
        return total.to(hidden_states.dtype).view(hidden_states.shape)


@dataclass(frozen=True)
class Form:
    """How a class keeps its experts.

    Attributes:
        kind: How the ternary module runs.
        layouts: How the tensors of a float module lie, in the order of use, given the module that
            holds it.
        runs_holder: Whether it takes over the forward of the module that holds it.
    """

    kind: type[BitExperts]
    layouts: Callable[[Any, Any], list[Layout]]
    runs_holder: bool = False


def _dbrx(module: Any, _: Any) -> list[Layout]:
    sizes = module.moe_num_experts, module.ffn_hidden_size, module.hidden_size
    first = [partial(Stack, name, *sizes, flat=True) for name in ("w1", "v1")]
    experts, rows, columns = sizes
    return [*first, partial(Stack, "w2", experts, columns, rows, flat=True, transposed=True)]


def _longcat_flash(module: Any, _: Any) -> list[Layout]:
    experts, inner, outer = module.num_routed_experts, module.intermediate_size, module.hidden_size
    unused = module.zero_expert_num
    return [
        partial(Stack, "gate_up_proj", experts, 2 * inner, outer, parts=2, unused=unused),
        partial(Stack, "down_proj", experts, outer, inner),
    ]


def _llama4(module: Any, _: Any) -> list[Layout]:
    experts, inner, outer = module.num_experts, module.expert_dim, module.hidden_size
    return [
        partial(Stack, "gate_up_proj", experts, 2 * inner, outer, parts=2, transposed=True),
        partial(Stack, "down_proj", experts, outer, inner, transposed=True),
    ]


def _jetmoe(module: Any, holder: Any) -> list[Layout]:
    rows = module.output_size
    # Its holder takes gate and up apart where the other projection reads half of what this gives.
    other = getattr(holder, "output_linear", None)
    parts = 2 if other not in (None, module) and rows == 2 * other.input_size else 1
    return [partial(Stack, "weight", module.num_experts, rows, module.input_size, parts=parts)]


def _inkling(module: Any, _: Any) -> list[Layout]:
    experts, (inner, outer) = module.n_shared_experts, module.gate_proj.shape[-2:]
    first = [partial(Stack, name, experts, inner, outer) for name in ("gate_proj", "up_proj")]
    return [*first, partial(Stack, "down_proj", experts, outer, inner)]


FORMS: dict[str, Form] = {
    "DbrxExpertGLU": Form(ExpertsOfAnotherForward, _dbrx, runs_holder=True),
    "InklingSharedExperts": Form(SharedExperts, _inkling),
    "JetMoeParallelExperts": Form(ExpertsOfSortedTokens, _jetmoe),
    "Llama4TextExperts": Form(ExpertsOfEveryToken, _llama4),
    "LongcatFlashExperts": Form(ExpertsWithIdentities, _longcat_flash),
}


def form_of(module: nn.Module) -> Form | None:
    """Returns how a float module keeps its experts, if its class is described here."""
    return None if isinstance(module, BitExperts) else FORMS.get(type(module).__name__)


def tensors_lie_so(module: nn.Module, layouts: list[Layout]) -> bool:
    """Tells whether a module's tensors have the sizes that its class says."""
    tensors = [module._parameters.get(layout.args[0]) for layout in layouts]
    sizes = [
        (layout.args[1] + layout.keywords.get("unused", 0), *layout.args[2:]) for layout in layouts
    ]
    return all(
        one is not None
        and one.is_floating_point()
        and one.numel() == count * rows * columns
        and one.dim() == (2 if layout.keywords.get("flat") else 3)
        for layout, one, (count, rows, columns) in zip(layouts, tensors, sizes, strict=True)
    )


def run_for_holder(holder: nn.Module, module: BitExperts) -> None:
    """Makes a module's forward that of the experts in it."""
    # Not the class's method: hooks, and what stands in for the forward, are on the experts.
    vars(holder)["forward"] = module.__call__


def give_back(model: nn.Module, module: nn.Module) -> None:
    """Takes back what `run_for_holder` did, in a whole model."""
    for holder in model.modules():
        if getattr(vars(holder).get("forward"), "__self__", None) is module:
            del vars(holder)["forward"]
