"""The contenders of bench/experts.py: BitLab and its peers, with the same ternary experts.

On a GPU a call ends when its results are there.

All compute the same layer of the same codes: `check` compares them before any is timed. Weights
are cold as they are in a model: each call sends its tokens to other experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from experts_peer import GgmlExperts, takes
from ggml_peer import Ggml
from torch import Tensor, nn
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from bitcore.packing import pack_ternary
from bitcore.prepared import PreparedLinear
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import find_experts, stacks_of
from bitlayers.experts import BitExperts, convert_experts

Call = Callable[[], object]
# Relative to the largest output: int8 activations twice, and 16-bit ones.
TOLERANCE = 0.06
# Bytes of weights that transformers' batched_mm may gather; it copies those of every row.
MOST_GATHERED = 1_500_000_000
# A power of two: codes times it are exact in every format.
_SCALE = 2.0**-5


@dataclass(frozen=True)
class Geometry:
    """A layer of experts.

    Attributes:
        name: The model that has it.
        kind: transformers' class.
        config: Makes its configuration, of what `sizes` says.
        experts, choices, hidden, wide: E, experts of a token, H, I.
    """

    name: str
    kind: type[nn.Module]
    config: Callable[..., Any]
    experts: int
    choices: int
    hidden: int
    wide: int

    def build(self) -> nn.Module:
        """Returns the module of transformers, on the meta device."""
        wide = {"moe_intermediate_size": self.wide, "intermediate_size": self.wide}
        count = {"num_experts": self.experts, "num_local_experts": self.experts}
        config = self.config(
            hidden_size=self.hidden, num_experts_per_tok=self.choices, **wide, **count
        )
        with torch.device("meta"):
            return self.kind(config).eval()


def geometries(quick: bool) -> dict[str, Geometry]:
    """Returns the layers by their short names; tiny ones of these classes to see that it runs."""
    qwen, mixtral, oss = modeling_qwen3_moe, modeling_mixtral, modeling_gpt_oss
    kinds = {
        "qwen3": ("Qwen3-30B-A3B", qwen.Qwen3MoeExperts, qwen.Qwen3MoeConfig),
        "mixtral": ("Mixtral-8x7B", mixtral.MixtralExperts, mixtral.MixtralConfig),
        "gpt-oss": ("GPT-OSS-20B", oss.GptOssExperts, oss.GptOssConfig),
    }
    full = {
        "qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "gpt-oss": (32, 4, 2880, 2880)
    }  # fmt: skip
    tiny = {"qwen3": (16, 4, 256, 256), "mixtral": (4, 2, 256, 512), "gpt-oss": (4, 2, 192, 96)}
    sizes = tiny if quick else full
    return {name: Geometry(*kinds[name], *sizes[name]) for name in kinds}


@dataclass
class Side:
    """One contender.

    Attributes:
        name: As in the tables.
        expert_bytes: Bytes of weights of one expert.
        calls: For an input [M, H] and weights [M, k], one call for each choice [M, k] of experts.
        output: What the last call gave, where calls do not return it.
        most_rows: Tokens times experts of each, above which it does not run; None for any.
    """

    name: str
    expert_bytes: int
    calls: Callable[[Tensor, Tensor, list[Tensor]], list[Call]]
    output: Callable[[Tensor], Tensor] | None = None
    most_rows: int | None = None


class Layer:
    """The experts of a layer, as every contender holds them.

    Args:
        geometry: Of the layer.
        ggml: A contender on CPUs; None where it is not installed.
        device: Where.
    """

    def __init__(self, geometry: Geometry, ggml: Ggml | None, device: str = "cpu") -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self.ternary = self._skeleton()
        self.floats = geometry.build().to(torch.bfloat16).to_empty(device=self.device)
        sizes = geometry.hidden, geometry.wide
        plain = "gpt-oss" not in geometry.name.lower() and takes(*sizes)
        self.peer = GgmlExperts(ggml, geometry.experts, *sizes) if ggml and plain else None
        self._fill()

    def _skeleton(self) -> BitExperts:
        holder = nn.ModuleDict({"experts": self.geometry.build()})
        (found,) = find_experts(holder, [])
        ternary = convert_experts(found.module, stacks_of(holder, found, BitLabConfig()))
        ternary.make_skeleton()
        return ternary.to_empty(device=self.device).eval()

    def _fill(self) -> None:
        stacks, peer = self.ternary.stacks, self.peer
        for name in stacks:
            for module in (self.ternary, self.floats):
                bias = module._parameters.get(f"{name}_bias")
                if bias is not None:
                    bias.detach().zero_()
            self.ternary.packed_stack(name)["qweight_scale"].fill_(_SCALE)
        for expert in range(self.geometry.experts):
            dense = []
            for name, stack in stacks.items():
                shape = stack.out_features, stack.in_features
                codes = torch.randint(-1, 2, shape, dtype=torch.int8, device=self.device)
                self.ternary.packed_stack(name)["qweight"][expert] = pack_ternary(codes)
                dense.append(codes.float() * _SCALE)
                held = self.floats._parameters[name]
                assert held is not None
                held.detach()[expert] = stack.stored(dense[-1])
            if peer is not None:
                peer.set_expert(expert, *dense)

    def sides(self) -> list[Side]:
        """Returns the contenders that can run here."""
        stacks = self.ternary.stacks.values()
        packed = sum(
            stack.packed_tensors()["qweight"][1][1] * stack.in_features for stack in stacks
        )
        full = sum(2 * stack.weights // stack.experts for stack in stacks)
        ended = self.device.type == "cuda"
        sides = [Side("bitlab", packed, partial(_forward, self.ternary, ended))]
        for name in ("eager", "grouped_mm", "batched_mm"):
            module = copy.copy(self.floats)
            module.config = copy.copy(module.config)
            module.config._experts_implementation = name
            most = MOST_GATHERED // full if name == "batched_mm" else None
            title = f"transformers bf16 {name}"
            sides.append(Side(title, full, partial(_forward, module, ended), most_rows=most))
        if self.peer is not None:
            peer = self.peer
            sides.append(
                Side(
                    "ggml TQ2_0 mul_mat_id",
                    peer.expert_bytes,
                    lambda x, weights, choices: peer.calls(x, choices),
                    lambda weights: (peer.y * weights.float().unsqueeze(-1)).sum(1),
                )
            )
        return sides

    def dense(self, tokens: int) -> list[Call]:
        """Returns BitLab's calls of one expert's two matrices as dense layers, each on so many
        tokens; one call for each expert.
        """
        calls: list[Call] = []
        stacks = self.ternary.stacks
        inputs = [
            torch.randn(tokens, one.in_features, device=self.device).bfloat16()
            for one in stacks.values()
        ]
        for expert in range(self.geometry.experts):
            layers = [
                PreparedLinear(
                    *self.ternary.packed(name, expert)[:2], None, stack.out_features,
                    stack.config.activation,
                )
                for name, stack in stacks.items()
            ]  # fmt: skip
            calls.append(partial(_both, layers, inputs))
        return [partial(_end, call) for call in calls] if self.device.type == "cuda" else calls


def _both(layers: list[PreparedLinear], inputs: list[Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)


def _end(call: Call) -> object:
    """Makes a call and waits until the GPU has done it."""
    result = call()
    torch.cuda.synchronize()
    return result


def _forward(
    module: nn.Module, ended: bool, x: Tensor, weights: Tensor, choices: list[Tensor]
) -> list[Call]:
    x = x.bfloat16()
    calls: list[Call] = [partial(module, x, choice, weights) for choice in choices]
    return [partial(_end, call) for call in calls] if ended else calls


def check(
    sides: list[Side], x: Tensor, weights: Tensor, choice: Tensor
) -> tuple[list[Side], dict[str, str]]:
    """Compares what the contenders compute with the first peer's; returns those that compute the
    same, but for rounding, and what is wrong with the others.
    """
    outputs: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for side in sides:
        try:
            value: Any = side.calls(x, weights, [choice])[0]()
            outputs[side.name] = (value if side.output is None else side.output(weights)).float()
        except Exception as error:  # the others are measured all the same
            failed[side.name] = f"{type(error).__name__}: {error}"
    name = next((name for name in outputs if name != "bitlab"), "bitlab")
    for other, output in outputs.items():
        first = outputs[name]
        difference = float((output - first).abs().max() / first.abs().max())
        if not difference <= TOLERANCE:
            failed[other] = f"differs from {name} by {difference:.3g}: not the same layer"
    return [side for side in sides if side.name not in failed], failed
