"""One gradient for the matrices of all experts: the same as `unbind` gives, in half the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitlayers.parts import Parts


def forward(parts: Any, x: Tensor, used: list[int]) -> Tensor:
    return sum((x @ parts[number]).square().sum() for number in used)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Some of them, in any order, one of them twice; the whole; the transposed whole.
@pytest.mark.parametrize("used", [[3], [4, 0, 2], [1, 1, 0], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_is_that_of_unbind(
    dtype: torch.dtype, used: list[int], transposed: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=dtype)
    weight = torch.randn(5, 4, 4, dtype=dtype)
    wanted, got = (weight.clone().requires_grad_() for _ in range(2))
    turn = (lambda part: part.t()) if transposed else (lambda part: part)
    for _ in range(2):
        # The second one is added to the first.
        one = forward([turn(part) for part in wanted.unbind(0)], x, used)
        parts = Parts(got)
        other = forward({number: turn(parts[number]) for number in set(used)}, x, used)
        assert torch.equal(one, other)
        one.backward()
        other.backward()
    assert wanted.grad is not None
    assert got.grad is not None
    assert torch.equal(got.grad, wanted.grad)
    unused = [number for number in range(5) if number not in used]
    assert not got.grad[unused].any()


def test_a_graph_that_is_kept_and_one_that_is_made_again() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 4, requires_grad=True)
    x = torch.randn(2, 4)
    wanted = torch.autograd.grad(forward(weight.unbind(0), x, [0, 2]), weight)[0]
    loss = forward(Parts(weight), x, [0, 2])
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], wanted)
    loss = checkpoint(lambda value: forward(Parts(weight), value, [0, 2]), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], wanted)


def test_without_gradients_parts_are_views() -> None:
    weight = torch.randn(3, 4, 4)
    part = Parts(weight)[1]
    assert part.data_ptr() == weight[1].data_ptr()
    assert part.grad_fn is None
    weight.requires_grad_()
    with torch.no_grad():
        assert Parts(weight)[1].grad_fn is None
    assert Parts(weight)[1].data_ptr() == weight[1].data_ptr()


# A step of one layer's experts: what it takes at most beside the weights, in MiB.
_MEASURE = """
import sys, torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

kind, how, experts, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sizes = {"hidden_size": 512, "num_experts_per_tok": 4}
if kind == "gpt_oss":
    module = GptOssExperts(GptOssConfig(**sizes, intermediate_size=256, num_local_experts=experts))
else:
    module = Qwen3MoeExperts(
        Qwen3MoeConfig(**sizes, moe_intermediate_size=256, num_experts=experts)
    )
torch.manual_seed(0)
for parameter in module.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
if how == "ternary":
    from bitlab_hf import BitLabConfig
    from bitlab_hf.model.experts import find_experts, swap_experts

    root = torch.nn.ModuleDict({"experts": module})
    swap_experts(root, find_experts(root, []), BitLabConfig())
else:
    module.config._experts_implementation = how
x = torch.randn(tokens, 512, requires_grad=True)
chosen = torch.rand(tokens, experts).topk(4, -1).indices
weights = torch.rand(tokens, 4, requires_grad=True)

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024

module(x[:8], chosen[:8], weights[:8]).sum().backward()
for tensor in (*module.parameters(), x, weights):
    tensor.grad = None
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
module(x, chosen, weights).square().sum().backward()
print(memory("VmHWM") - before)
"""


# Many experts, so that weights count most, and many tokens, so that activations do.
@pytest.mark.ci
@pytest.mark.parametrize(("experts", "tokens"), [(64, 512), (8, 4096)])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_takes_what_the_float_one_takes(kind: str, experts: int, tokens: int) -> None:
    def measure(how: str) -> int:
        command = [sys.executable, "-c", _MEASURE, kind, how, str(experts), str(tokens)]
        # What is freed goes back at once, and counts no more.
        held = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=held, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        return int(done.stdout)

    ternary, floating = measure("ternary"), measure("grouped_mm")
    weights = experts * 3 * 512 * 256 * 4 // 2**20
    print(f"{kind}, {experts} experts, {tokens} tokens: {ternary} MiB, float {floating} MiB")
    assert floating > weights // 2
    assert ternary <= 1.15 * floating + 8
