"""Ops called from inductor's C++: the same bits as through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore import ops, use_backend
from bitcore.errors import BackendError
from bitcore.kernels.inductor import inductor_options, sum_as_eager
from tests.conftest import native_kernels

K, N = 256, 70
ACTIVATIONS = ("int8_per_token", "int8_per_tensor", "float")


def packed(granularity: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    size = 64 if granularity.startswith("per_group") else None
    return ops.pack_weight(torch.randn(N, K), granularity, size)


class Everything(nn.Module):
    """Every form of the ops on one input."""

    def forward(self, x: Tensor, scattered: Tensor, rows: Tensor, bias: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for granularity in ("per_tensor", "per_channel", "per_group", "per_group_float32"):
            qweight, scale, *multiplier = self.weights[granularity]
            for activation in ACTIVATIONS:
                out.append(ops.linear(x, qweight, scale, None, N, activation, *multiplier))
            out.append(ops.linear(scattered, qweight, scale, bias, N, ACTIVATIONS[0], *multiplier))
        scale = self.weights["per_channel"][1]
        out.append(ops.linear_int8(x, rows, scale, None))
        out.append(ops.linear_int8(scattered, rows, scale, bias.to(x.dtype)))
        out.append(torch.ops.bitlab.sum_last(x))
        return out

    def __init__(self) -> None:
        super().__init__()
        for name in ("per_tensor", "per_channel", "per_group", "per_group_float32"):
            for index, one in enumerate(packed(name)):
                self.register_buffer(f"{name}_{index}", one)

    @property
    def weights(self) -> dict[str, tuple[Tensor, ...]]:
        names = ("per_tensor", "per_channel", "per_group", "per_group_float32")
        return {
            name: tuple(one for key, one in self._buffers.items() if key.rpartition("_")[0] == name)
            for name in names
        }  # type: ignore[return-value]


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Callable[..., Any]:
    exported = torch.export.export(module, inputs, strict=False)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(folder / "made.pt2"), inductor_configs=inductor_options()
    )
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(package)
    return loaded


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_eager(dtype: torch.dtype, tmp_path: Path) -> None:
    native_kernels()
    torch.manual_seed(1)
    x = torch.randn(3, 1, K).to(dtype)
    scattered = torch.randn(K, 5).to(dtype).T
    assert not scattered.is_contiguous()
    rows = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    inputs = (x, scattered, rows, torch.randn(N))
    module = Everything()
    with torch.no_grad():
        wanted = module(*inputs)
        run = compiled(module, inputs, tmp_path)
        got = run(*inputs)
        assert len(got) == len(wanted) == 4 * 4 + 3
        for ours, theirs in zip(got, wanted, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        # A token with NaN gives NaN and leaves the others alone; nothing is left from call to call.
        x[1] = float("nan")
        for ours, theirs in zip(run(*inputs), module(*inputs), strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


class Norms(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.mean(-1, keepdim=True), x.mean(2, keepdim=True), x.mean(-1), x.mean((0, 2), True)


def test_means_over_the_last_axis_become_sums() -> None:
    x = torch.randn(2, 3, 576)
    exported = torch.export.export(Norms(), (x,), strict=False)
    sum_as_eager(exported.graph)
    exported.graph_module.recompile()
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.bitlab.sum_last.default) == 2
    assert targets.count(torch.ops.aten.mean.dim) == 2
    for ours, theirs in zip(exported.module()(x), Norms()(x), strict=True):
        assert torch.equal(ours, theirs)


def test_the_reference_is_called_through_the_dispatcher() -> None:
    with use_backend("reference"):
        assert "aot_inductor.custom_ops_to_c_shims" not in inductor_options()


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(BackendError, match=r"torch must be 2\.10 or newer, got 2\.9\.1"):
        inductor_options()


def test_a_path_that_cannot_stand_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    native_kernels()
    monkeypatch.setattr("bitcore.kernels.inductor.library_path", lambda _: Path('/a"b/lib.so'))
    with pytest.raises(BackendError, match="path must hold no quotes"):
        inductor_options()


def test_record_is_the_headers() -> None:
    """The text writes the fields of bk_linear_args by place."""
    root = Path(__file__).parents[2]
    header = (root / "csrc/include/bitkernels.h").read_text()
    body = header[header.index("typedef struct {") : header.index("} bk_linear_args;")]
    names = [
        name.strip(" *")
        for line in body.splitlines()[1:]
        for name in line.rstrip(";").replace("const void *", "").replace("void *", "")
        .replace("const float *", "").replace("const uint8_t *", "").replace("int64_t ", "")
        .strip().split(",")
        if name.strip()
    ]  # fmt: skip
    text = (root / "bitcore/kernels/inductor_shims.inl").read_text()
    listed = text[text.index("BITLAB_QWEIGHT,") : text.index("BITLAB_FIELDS")]
    fields = [one.strip() for one in listed.split(",") if one.strip()]
    assert fields == [f"BITLAB_{name.upper()}" for name in names]
