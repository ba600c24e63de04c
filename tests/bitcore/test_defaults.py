"""What a process has set as torch's default device or dtype changes no result."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitcore
from bitcore import ops, reference
from bitcore.across import Group, across, across_int8, filled_up
from bitcore.kernels import kernels_for
from bitcore.prepared import PreparedExperts, PreparedLinear
from bitcore.qat_packed import qat_packed
from bitcore.quantize import quantize_rows_int8

ROOT = Path(__file__).parents[2]
FACTORIES = {
    f"torch.{name}"
    for name in ("arange", "as_tensor", "empty", "eye", "full", "ones", "rand", "tensor", "zeros")
}
ALONE = Group(lambda largest: None, lambda sums: None)


def compute() -> list[Tensor]:
    """Everything that the kernels of this process compute, the way past the dispatcher first."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    found: list[Tensor | None] = []
    weight, few, many, wide = values(9, 128), values(3, 128), values(40, 128), values(300, 4096)
    index = torch.zeros(40, dtype=torch.int64, device="cpu")
    for granularity in ("per_tensor", "per_channel", "per_group", "per_group_float32"):
        packed = qweight, scale, multiplier = kernels_for("cpu").pack_weight(
            weight, granularity, 64
        )
        found += [*packed, ops.row_sums(weight)]
        for activation in ("int8_per_token", "int8_per_tensor", "float"):
            constants = 9, activation, multiplier
            held = [None if one is None else one[None] for one in packed]
            with torch.no_grad():
                layer = PreparedLinear(qweight, scale, None, *constants)
                experts = PreparedExperts(*held[:2], None, 9, activation, held[2])
                found += [layer(few), layer(many), experts(many, index)]
            x, own = many.clone().requires_grad_(), weight.clone().requires_grad_()
            y = qat_packed(x, own, None, qweight, scale, activation, multiplier)
            y.square().sum().backward()
            found += [y, x.grad, own.grad]
            found.append(across(few, qweight, scale, None, 9, activation, multiplier, ALONE))
        found += _kernels(weight, many, wide, packed)
    codes, scale = quantize_rows_int8(weight)
    found += [codes, scale, across_int8(few, filled_up(codes), scale, None, ALONE)]
    x = many.clone().requires_grad_()
    ops.linear_int8(x, codes, scale, None).square().sum().backward()
    return [one for one in (*found, x.grad) if one is not None]


def _kernels(
    weight: Tensor, x: Tensor, wide: Tensor, packed: tuple[Tensor, Tensor, Tensor | None]
) -> list[Tensor | None]:
    """What is called past the ops, by itself."""
    kernels, (qweight, scale, multiplier) = kernels_for("cpu"), packed
    codes, x_scale = kernels.quantize_activation(x, False)
    rows, row_scale = weight.to(torch.int8), weight[:, 0].contiguous()
    args = x, qweight, scale, None, 9, "int8_per_token", torch.float32, multiplier
    # More scratch than a thread keeps.
    large, size, *_ = kernels.pack_weight(wide[:9], "per_tensor", 0)
    assert kernels.find_invalid_code([qweight]) is None
    return [
        *(codes, x_scale),
        kernels.pack_codes(weight, scale),
        *kernels.learned_gradients(weight, weight, scale),
        kernels.matmul(codes, qweight, 9),
        kernels.linear(wide, large, size, None, 9, "int8_per_token", torch.float32),
        *kernels.linear_with_codes(*args),
        kernels.unpack_weight(qweight, scale, 9, torch.float32, multiplier),
        kernels.input_gradient(x[:, :9], qweight, scale, 9, torch.float32, multiplier),
        kernels.linear_int8(x, rows, row_scale, None, torch.float32),
        reference.input_gradient_int8(x[:, :9], rows, row_scale, torch.float32),
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_default_device_is_not_the_kernels(backend: str) -> None:
    """A process of its own: nothing has scratch memory yet, and what has no memory may end it."""
    code = (
        "import torch\n"
        "from tests.bitcore.test_defaults import compute\n"
        "with torch.device('meta'):\n"
        "    found = compute()\n"
        "for one, other in zip(found, compute(), strict=True):\n"
        "    assert torch.equal(one, other)\n"
    )
    environment = {**os.environ, "BITLAB_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_a_default_dtype_is_not_the_kernels(backend: str, default_dtype: torch.dtype) -> None:
    expected = compute()
    torch.set_default_dtype(default_dtype)
    for one, other in zip(compute(), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_what_is_made_names_its_device_and_dtype() -> None:
    """In every module, those too that need a GPU to run."""
    unnamed = []
    for path in Path(bitcore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                given = {keyword.arg for keyword in node.keywords}
                unnamed += [] if given >= {"device", "dtype"} else [f"{path}:{node.lineno}"]
    assert not unnamed
