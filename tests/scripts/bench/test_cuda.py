"""The GPU benchmark where there is no GPU: what it says, and how it judges."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitcore import reference
from bitcore.kernels.cuda import UNPACKED_TOKENS
from tests import processes

SCRIPT = Path(__file__).parents[3] / "scripts/bench/cuda.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("cuda")


def test_targets_and_table(bench: ModuleType) -> None:
    rows = [
        bench.Row("8192x8192", 1, "bitlab", 8.0, 7.0, 9.0, 2097.0, 16.8),
        bench.Row("8192x8192", 1, "bitlab, groups of 64", 10.0, 9.0, 11.0, 1782.6, 13.4),
        bench.Row("8192x8192", 1, bench.SEVERAL, 12.8, 12.0, 13.0, 1310.7, 10.5),
        bench.Row("8192x8192", 1, "cublas bf16", 50.0, 49.0, 52.0, 2684.0, 2.7),
        bench.Row("2560x6912", 1, "bitlab", 7.0, 6.0, 8.0, 632.0, 5.1),
        bench.Row("2560x6912", 1, "cublas bf16", 10.5, 10.0, 11.0, 3370.0, 3.4),
    ]
    limits = {"copy_gbs": 2600.0, "bf16_tops": 650.0}
    speeds = {"bitlab int8": 90.0, "dense bf16": 50.0, "bitnet packed": 8.0}
    found = {target.name: target for target in bench.targets(rows, limits, speeds)}
    assert found["M 1, 8192x8192: 6x bf16"].verdict == "yes"
    share = found["M 1, 8192x8192: 70 % of the copy bandwidth"].measured
    assert share == pytest.approx(80.65, 1e-3)
    assert found["M 1, 2560x6912: 2x bf16"].verdict == "NO"
    assert found["M 1, 2560x6912: under 6 us"].verdict == "NO"
    assert found["M 256, 8192x8192: 1.3x bf16"].verdict == "not in this run"
    assert found["generate: 2x dense bf16"].verdict == "NO"
    assert found["generate: 10x bitnet packed"].measured == pytest.approx(11.25)
    assert bench.target_table(list(found.values())).splitlines()[2:4] == [
        "| M 1, 8192x8192: 6x bf16 | 6.25 | yes |",
        "| M 1, 8192x8192: 70 % of the copy bandwidth | 80.65 | yes |",
    ]
    assert found["every M, 2560x6912: no slower than bf16"].measured == 1.5
    assert found["every M, 640x2560: no slower than bf16"].verdict == "not in this run"
    name = "M 1, 8192x8192, groups of 64: 0.9 of one scale's speed"
    assert (found[name].measured, found[name].verdict) == (0.8, "NO")
    other = found["M 4096, 8192x8192, groups of 64: 0.85 of one scale's speed"]
    assert (other.bound, other.verdict) == (0.85, "not in this run")
    line = "| 8192x8192 | 1 | 8.00 | 50.00 | 6.25 | 2097 | 81% | 16.8 | 3% | - | 0.80 | 0.62 |"
    assert bench.layer_table(rows, limits).splitlines()[2] == line
    # Where BitLab's own side was wrong.
    rest = bench.layer_table(rows[3:4], limits).splitlines()[2]
    assert rest == "| 8192x8192 | 1 | - | 50.00 " + 8 * "| - " + "|"


def test_the_simpler_quantizer_is_kept_unless_the_kernel_is_clearly_faster(
    bench: ModuleType,
) -> None:
    for us, keep in ((5.0, "kernel"), (9.5, "torch.compile"), (20.0, "torch.compile")):
        assert bench.Quantizer("forward: x", "8x64", "float32", us, 10.0, 1.0).keep == keep


def run_quick(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["cuda.py", "--quick", "--json", str(path), *options])
    bench.main()
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_everything_runs_without_a_gpu(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same code as on a GPU, but for graphs and events."""
    result = run_quick(bench, monkeypatch, tmp_path / "quick.json", "--no-generate")
    # Of 64 inputs there is no group of 128, and one token is never in several launches.
    assert len(result["rows"]) == 2 * (4 + 3) + 2
    assert all(row["us"] > 0 for row in result["rows"])
    assert [one["name"] for one in result["quantizers"]] == 4 * [
        "forward: x", "forward: W", "backward: W",
    ]  # fmt: skip
    assert all(one["equal"] > 0.99 for one in result["quantizers"])
    # Both shapes, on both sides of the number of tokens from which a weight is unpacked.
    assert [(one["tokens"], one["engine"]) for one in result["gradients"]] == 2 * [
        (tokens, f"{who}, {what}")
        for tokens in (UNPACKED_TOKENS - 1, UNPACKED_TOKENS) for what in ("dx", "dW")
        for who in ("bitlab", "cublas bf16")
    ]  # fmt: skip
    assert result["generate"] is None
    assert {target["verdict"] for target in result["targets"]} == {"not in this run"}
    tables = (tmp_path / "quick.md").read_text()
    assert "| quantizer | shape | dtype |" in tables
    assert "| target | measured | met |" in tables


def test_a_wrong_side_is_left_out_and_the_rest_goes_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = reference.linear

    def linear(*args: Any) -> torch.Tensor:
        x, out_features, multiplier = args[0], args[4], args[7:]
        if out_features == 96 and len(x) == 20:
            raise RuntimeError("a launch failed")
        return right(*args) + bool(multiplier)

    monkeypatch.setattr(reference, "linear", linear)
    with pytest.raises(SystemExit, match="64x128, M 1, bitlab, groups of 128: a wrong result"):
        run_quick(bench, monkeypatch, tmp_path / "quick.json", "--no-generate")
    result = json.loads((tmp_path / "quick.json").read_text())
    assert result["failed"][-2:] == [
        "96x64, M 20, bitlab: RuntimeError: a launch failed",
        "96x64, M 20, bitlab, groups of 64: RuntimeError: a launch failed",
    ]
    engines = [(row["shape"], row["tokens"], row["engine"]) for row in result["rows"]]
    for shape, tokens in product(("64x128", "96x64"), (1, 20)):
        assert (shape, tokens, "cublas bf16") in engines
        assert ((shape, tokens, "bitlab") in engines) == ((shape, tokens) != ("96x64", 20))
    assert not any("groups" in engine for _, _, engine in engines)
    # What comes behind the layers, too.
    assert len(result["quantizers"]) == 12
    assert "| target | measured | met |" in (tmp_path / "quick.md").read_text()


def test_every_number_of_tokens_is_written(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = bench.measure

    def measure(how: Any, shape: str, tokens: int) -> Any:
        if tokens == 20:
            raise SystemExit("cut off")
        return right(how, shape, tokens)

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(SystemExit, match="cut off"):
        run_quick(bench, monkeypatch, tmp_path / "quick.json", "--no-generate")
    rows = json.loads((tmp_path / "quick.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1] * 4


@pytest.mark.ci
def test_a_model_runs_without_a_gpu(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--shapes", "64x64", "--tokens", "1")
    result = run_quick(bench, monkeypatch, tmp_path / "quick.json", *options)
    engines = {one["engine"]: one for one in result["generate"]["engines"]}
    assert tuple(engines) == bench.ENGINES
    assert result["generate"]["cache"] == "static"
    measured = {target["name"]: target["measured"] for target in result["targets"]}
    speeds = {name: engine["decode_tok_s"] for name, engine in engines.items()}
    ratio = speeds["bitlab int8"] / speeds["dense bf16"]
    assert measured["generate: 2x dense bf16"] == pytest.approx(ratio)


def test_without_a_gpu_it_says_so() -> None:
    done = processes.run(SCRIPT, *["--help"] * torch.cuda.is_available())
    assert "CUDA" in done.stdout + done.stderr
    assert (done.returncode == 0) == torch.cuda.is_available()
