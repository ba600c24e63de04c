"""BitExperts: the life of a `BitLinear` for the experts of a layer, which a model keeps as tensors.

Most mixtures of experts hold the matrices of all experts of a layer in one Parameter, and the gate
and up projections in one matrix each. The module that holds them keeps its class, its activation
and its place in the tree: it becomes an instance of a subclass that adds the three states. LATENT,
its Parameters are the float model's, under the float model's keys. DEPLOYED, each is replaced by
``<name>_qweight``, ``<name>_qweight_scale`` and with groups ``<name>_qweight_multiplier``.

A module of its own was the alternative. It would lose whatever the model's class does between the
two products, which differs from model to model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from bitcore import estimators, ops
from bitcore.errors import LifecycleError
from bitcore.prepared import PreparedExperts
from bitlayers import learned_experts
from bitlayers.checks import check_stack, log_deployed_stays, stack_problem
from bitlayers.packed_experts import PackedExperts
from bitlayers.projection import (
    DeployedProjection,
    PackedProjection,
    Projection,
    TrainedProjection,
)
from bitlayers.quantized import cast_dtype
from bitlayers.routing import Routing
from bitlayers.stack import Stack
from bitlayers.state import SCALES, Packed
from bitlayers.subclass import blank, ternary_class

_LEAVES = ("qweight", *SCALES)


class BitExperts(nn.Module):
    """The part that a ternary experts module adds to the model's own class.

    `convert_experts` makes one. Training, evaluation and the deployed module compute the same
    forward, as those of a `BitLinear` do: with int8 activations their float32 outputs are equal
    bit for bit.

    Attributes:
        stacks: The projections, by the names of their Parameters, in the order of use.
        quant_strength: How far the training forward is quantized; see `set_quant_strength`.
        float_dtype: dtype of the float Parameters that the module stands for.
        keeps_tokens: Whether it is given the tokens of the layer, and returns each one's sum.
    """

    stacks: dict[str, Stack]
    quant_strength: float
    float_dtype: torch.dtype
    num_experts: int
    keeps_tokens = True
    has_gate: bool
    has_post_expert_norm: bool
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _cache: PackedExperts
    _prepared: dict[str, PreparedExperts]

    @property
    def is_deployed(self) -> bool:
        """Whether the float weights are gone for good."""
        return all(self.is_packed(name) for name in self.stacks)

    def is_packed(self, name: str) -> bool:
        """Tells whether one projection has been deployed."""
        return self._parameters.get(f"{name}_qweight") is not None

    # The forward.

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Sends tokens through their experts; see `through` for what it is given and returns."""
        tokens = hidden_states.shape[:-1].numel()
        projections = [self._projection(name, tokens) for name in self.stacks]
        return self.through(projections, hidden_states, *args, **kwargs)

    def through(
        self, projections: Sequence[Projection], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Does as `forward` does, with these projections: what a class that keeps its experts in
        another way has of its own.

        Args:
            projections: As `stacks` has them.
            hidden_states: [M, H].
            *args: Two. int [M, k], the experts of each token; one that is not below the number of
                experts is none, and adds nothing. Float [M, k], what each expert's output is
                multiplied with.
            **kwargs: None.

        Returns:
            [M, H] of the dtype of hidden_states.
        """
        tokens, index, weights = self.routed(hidden_states, *args, **kwargs)
        routing = Routing(index, self.num_experts)
        *firsts, last = projections
        outer = last(self.activated(*(first(tokens, routing) for first in firsts)), routing)
        outer = self.post_expert_norm(outer) if self.has_post_expert_norm else outer
        return routing.weighted_sum(outer, weights, hidden_states.dtype)

    def routed(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens [M, H], the experts of each [M, k], and their weights [M, k], of what
        the forward is given.
        """
        return hidden_states, *args

    def activated(self, *inner: Tensor) -> Tensor:
        """Returns what the last projection reads of what those before it give."""
        (first,) = inner
        return self._apply_gate(first) if self.has_gate else self.act_fn(first)

    def _projection(self, name: str, tokens: int) -> Projection:
        """Returns one projection for one forward pass."""
        weight: Tensor | None = self._parameters.get(name)
        bias: Tensor | None = self._parameters.get(f"{name}_bias")
        stack = self.stacks[name]
        if weight is None:
            packed = tuple(self.packed_stack(name).values())
            return DeployedProjection(stack, packed, bias, self._prepared)
        learned = learned_experts.of(self, name)
        if self.training:
            return TrainedProjection(stack, weight, bias, self.quant_strength, learned)
        bias = None if bias is None else bias.detach()
        kept = self._cache.of(name, [weight] if learned is None else [weight, learned], tokens)
        return PackedProjection(stack, partial(self.packed, name), bias, kept)

    def packed_stack(self, name: str) -> dict[str, Tensor]:
        """Returns the packed tensors of all experts of a deployed projection: ``qweight``,
        ``qweight_scale``, and ``qweight_multiplier`` where there is one.
        """
        held = {leaf: self._leaf(name, leaf) for leaf in _LEAVES}
        return {leaf: tensor for leaf, tensor in held.items() if tensor is not None}

    def packed(self, name: str, expert: int) -> Packed:
        """Returns an expert's ``(qweight, qweight_scale)``, with multipliers these too, of one
        projection: as deployed, else packed now.
        """
        if self.is_packed(name):
            return tuple(tensor[expert] for tensor in self.packed_stack(name).values())
        # What was made under inference_mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            stack, weight = self.stacks[name], self._parameters[name]
            learned = learned_experts.of(self, name)
            scale = None if learned is None else learned[expert]
            return stack.pack(stack.apart(weight)[expert], scale)  # type: ignore[arg-type]

    def _leaf(self, name: str, leaf: str) -> Tensor | None:
        table: Any = self._parameters if leaf == "qweight" else self._buffers
        held: Tensor | None = table.get(f"{name}_{leaf}")
        return held

    def invalidate_cache(self) -> None:
        """Drops the packed weights of eval mode; see `bitlayers.training.Fingerprint`."""
        self._cache, self._prepared = PackedExperts(), {}

    # Life.

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval mode; a deployed module stays in eval mode and says so once."""
        self.invalidate_cache()
        if self.is_deployed:
            if mode:
                log_deployed_stays()
            mode = False
        return super().train(mode)

    def deploy(self) -> Self:
        """Packs the weights for good: the float weights are dropped and nothing trains any more.

        Raises:
            LifecycleError: The module is deployed, on the meta device, sharded or parametrized.
            NonFiniteError: An expert's weights hold NaN or infinity; nothing is changed.
            ArgumentError: See `build_deployment`; nothing is changed.
        """
        self.check_deployable("experts")
        for name, packed in self.build_deployment().items():
            self.commit(name, *packed)
        return self

    def check_deployable(self, module: str) -> None:
        """Checks that the module can be deployed, changing nothing.

        Args:
            module: What messages call it.

        Raises:
            LifecycleError, NonFiniteError: See `deploy`.
            ArgumentTypeError: The weights have a dtype that cannot be packed.
        """
        if self.is_deployed:
            raise LifecycleError(
                f"deploy: {module} must be latent, got experts that are deployed already"
            )
        for name, stack in self.stacks.items():
            check_stack(self, stack, f"{module}.{name}")
            learned_experts.check(self, name, f"{module}.{name}")

    def build_deployment(self, module: str = "experts") -> dict[str, Packed]:
        """Returns the packed tensors of all experts, by the projection; the module stays as it is.

        Args:
            module: What messages call it.

        Raises:
            ArgumentError: The estimator gave a scale that is not finite and positive.
        """
        built = {}
        for name, stack in self.stacks.items():
            weight = stack.apart(self._parameters[name])  # type: ignore[arg-type]
            built[name] = stack.pack_all(weight, learned_experts.of(self, name))
            quantizer, said = stack.config.weight_quantizer, f"{module}.{name}"
            estimators.check_scales(built[name][1], weight, quantizer, said)
        return built

    def commit(
        self,
        name: str,
        qweight: Tensor,
        qweight_scale: Tensor,
        qweight_multiplier: Tensor | None = None,
    ) -> None:
        """Makes one projection deployed with these packed tensors, which it keeps.

        Args:
            name: The projection.
            qweight: uint8 [E, ceil(N / 4), K].
            qweight_scale: float32 [E, N], or [E, N, K / G].
            qweight_multiplier: uint8 [E, N, K / G] beside a scale [E, N], or None.
        """
        self.invalidate_cache()
        # Not `del`: who asks the module for it finds that it is none.
        self.register_parameter(name, None)
        learned_experts.drop(self, name)
        packed = nn.Parameter(qweight, requires_grad=False)
        self.register_parameter(f"{name}_qweight", packed)
        self.register_buffer(f"{name}_qweight_scale", qweight_scale)
        if qweight_multiplier is not None:
            self.register_buffer(f"{name}_qweight_multiplier", qweight_multiplier)
        bias = self._parameters.get(f"{name}_bias")
        if bias is not None:
            bias.requires_grad_(False)
        if self.is_deployed:
            super().train(False)

    def share(self, name: str, other: BitExperts) -> None:
        """Makes one projection deployed with the packed tensors of other experts, which are one
        Parameter then: counted, moved and saved once.
        """
        self.commit(name, *other.packed_stack(name).values())
        self._parameters[f"{name}_qweight"] = other._parameters[f"{name}_qweight"]

    def make_skeleton(self) -> None:
        """Makes a latent module deployed with empty packed tensors, for a loader to fill."""
        for name, stack in self.stacks.items():
            device = cast(Tensor, self._parameters[name]).device
            kinds = stack.packed_tensors().values()
            made = (torch.empty(shape, dtype=kind, device=device) for kind, shape in kinds)
            self.commit(name, *made)

    def dequantized(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns codes times scale of all experts as the float model has them: exactly what the
        module multiplies with, rounded once to dtype (default float32).
        """
        stack, dtype = self.stacks[name], dtype or torch.float32
        matrices = []
        for expert in range(stack.experts):
            qweight, scale, *multiplier = self.packed(name, expert)
            rows = stack.out_features
            matrix = ops.unpack_weight(qweight, scale, rows, dtype, *multiplier)
            matrices.append(matrix)
        return stack.together(matrices)

    def packed_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of each packed tensor of the deployed module, by name."""
        return {
            f"{name}_{leaf}": held
            for name, stack in self.stacks.items()
            for leaf, held in stack.packed_tensors().items()
        }

    def float_class(self) -> type[nn.Module]:
        """Returns the model's own class."""
        return cast(type[nn.Module], type(self).__bases__[1])

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Makes the module one of the model's own class again, with float weights of dtype."""
        for name in self.stacks:
            weight = nn.Parameter(self.dequantized(name, dtype))
            for leaf in _LEAVES:
                table = self._parameters if leaf == "qweight" else self._buffers
                table.pop(f"{name}_{leaf}", None)
            self._parameters[name] = weight
            learned_experts.drop(self, name)
            bias = self._parameters.get(f"{name}_bias")
            if bias is not None:
                self._parameters[f"{name}_bias"] = nn.Parameter(bias.detach().to(weight.dtype))
        kind = self.float_class()
        for field in ("stacks", "quant_strength", "float_dtype", "_cache", "_prepared"):
            del self.__dict__[field]
        self.__class__ = kind  # type: ignore[assignment]
        return self

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("stacks", ()) and self.is_packed(name):
            # Its shape and dtype are asked for, not its values: these would be a float model's
            # memory. On the meta device it cannot be multiplied with by mistake.
            shape, dtype = self.stacks[name].shape, self.float_dtype
            stands: Any = torch.empty(shape, dtype=dtype, device="meta")
            # The model's own initialization would fill it.
            stands._is_hf_initialized = True
            return stands
        return super().__getattr__(name)

    # State dict, moves, copies.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.invalidate_cache()
        exact = learned_experts.exact_values(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        learned_experts.keep_exact(self, exact)
        self.float_dtype = cast_dtype(fn, self.float_dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.invalidate_cache()
        for stack in self.stacks.values():
            problem = stack_problem(self, stack, state_dict, prefix)
            if problem is not None:
                error_msgs.append(problem)
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        learned_experts.start_missing(self, self.stacks, prefix, missing_keys)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: everything but the cache."""
        return {**self.__dict__, "_cache": PackedExperts(), "_prepared": {}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles by the model's own class, since the subclass stands in no module."""
        return blank, type(self).__bases__, self.__getstate__()

    def extra_repr(self) -> str:
        """Returns what ``repr`` shows: state, and sizes and scheme of each projection."""
        state = "deployed" if self.is_deployed else "latent"
        return ", ".join([state, *(f"{name}={stack}" for name, stack in self.stacks.items())])


def convert_experts(
    module: nn.Module, stacks: Iterable[Stack], form: type[BitExperts] = BitExperts
) -> BitExperts:
    """Makes a float experts module a latent ternary one, in place; its Parameters stay.

    Args:
        module: It has ``num_experts``, ``has_gate``, ``has_post_expert_norm``, and what these ask
            for of ``_apply_gate``, ``act_fn`` and ``post_expert_norm``; for another form what that
            one asks for.
        stacks: Its projections, in the order of use; two of them.
        form: A subclass whose `BitExperts.through` does as the module's own forward.

    Raises:
        LifecycleError: The module is ternary already.
    """
    if isinstance(module, BitExperts):
        raise LifecycleError("convert_experts: module must be float, got ternary experts")
    held = {stack.name: stack for stack in stacks}
    name, stack = next(iter(held.items()))
    first = module._parameters[name]
    assert first is not None
    # Some classes call it by another name.
    module.__dict__.setdefault("num_experts", stack.experts)
    fields = {"stacks": held, "quant_strength": 1.0, "float_dtype": first.dtype}
    module.__dict__.update(fields, _cache=PackedExperts(), _prepared={})
    learned_experts.make(module, held)
    module.__class__ = ternary_class(form, type(module))
    return cast(BitExperts, module)
