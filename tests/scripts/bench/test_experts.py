"""The benchmark of experts, on tiny layers: what it writes, not how fast anything is."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import processes

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

import experts
from experts_sides import Layer, Side, check

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[3] / "scripts" / "bench"
SCRIPT = BENCH / "experts.py"
PEERS = {f"transformers bf16 {name}" for name in ("eager", "grouped_mm", "batched_mm")}


def test_every_geometry(tmp_path: Path) -> None:
    output = tmp_path / "experts.json"
    done = processes.run(SCRIPT, "--quick", "--threads", "1", "--json", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["isa"] in done.stdout
    assert "| M | engine |" in output.with_suffix(".md").read_text()
    installed = result["machine"]["versions"]["llama-cpp-python"] != "not installed"
    assert result["ggml"] == installed
    names = {"Qwen3-30B-A3B": True, "Mixtral-8x7B": True, "GPT-OSS-20B": False}
    assert {row["geometry"] for row in result["rows"]} == set(names)
    for name, has_ggml in names.items():
        rows = [row for row in result["rows"] if row["geometry"] == name]
        assert {row["tokens"] for row in rows} == {1, 5}
        engines = {"bitlab", "bitlab dense", *PEERS}
        engines |= {"ggml TQ2_0 mul_mat_id"} if installed and has_ggml else set()
        assert {row["engine"] for row in rows} == engines
        for row in rows:
            timing = row["us"]
            assert 0 < timing["p10"] <= timing["p50"] <= timing["p90"]
            assert row["gbs"] == pytest.approx(row["weight_bytes"] / timing["p50"] / 1e3)
            assert row["dram_share"] == pytest.approx(row["gbs"] / row["dram_gbs"])
    # Sixteen experts of two matrices: [512, 256] and [256, 256] codes, four to a byte.
    ours = [row for row in result["rows"] if row["engine"] == "bitlab"]
    assert ours[0]["visited"] == 4
    assert ours[0]["weight_bytes"] == 4 * (512 * 256 + 256 * 256) // 4
    products = 4 * (512 * 256 + 256 * 256)
    assert ours[0]["gmacs"] == pytest.approx(products / ours[0]["us"]["p50"] / 1e3)
    # The targets are of the real layers.
    assert [target["measured"] for target in result["targets"]] == [None] * 4


def side(name: str, times: float | None) -> Side:
    """A contender that gives its input so many times, or fails."""

    def call(x: Tensor) -> Tensor:
        if times is None:
            raise RuntimeError("no kernel")
        return times * x

    return Side(name, 1, lambda x, weights, choices: [partial(call, x) for _ in choices])


@pytest.mark.parametrize("wrong", [None, 2.0, float("nan")])
def test_a_contender_that_is_wrong_is_left_out(wrong: float | None) -> None:
    """Whoever it is: BitLab's is not what the peers are measured by."""
    x = torch.randn(3, 8)
    for name in ("bitlab", "transformers bf16 grouped_mm", "ggml TQ2_0 mul_mat_id"):
        names = ["bitlab", "transformers bf16 eager", "transformers bf16 grouped_mm",
                 "ggml TQ2_0 mul_mat_id"]  # fmt: skip
        sides = [side(one, wrong if one == name else 1.01) for one in names]
        right, failed = check(sides, x, x, torch.zeros(3, 1))
        assert [one.name for one in right] == [one for one in names if one != name]
        assert list(failed) == [name]
        assert ("no kernel" if wrong is None else "not the same layer") in failed[name]


@pytest.mark.parametrize("left_out", ["bitlab", "transformers bf16 eager"])
def test_the_others_are_measured_without_it(
    left_out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sides_of = Layer.sides

    def sides(layer: Layer) -> list[Side]:
        return [side(left_out, None) if one.name == left_out else one for one in sides_of(layer)]

    monkeypatch.setattr(Layer, "sides", sides)
    output = tmp_path / "experts.json"
    options: list[Any] = ["--quick", "--geometry", "qwen3", "--threads", "1", "--json", output]
    monkeypatch.setattr(sys, "argv", ["experts.py", *map(str, options)])
    with pytest.raises(SystemExit, match=f"Qwen3-30B-A3B, 1 tokens, {left_out}: RuntimeError"):
        experts.main()
    result = json.loads(output.read_text())
    assert len(result["failed"]) == 2
    for tokens in (1, 5):
        engines = {row["engine"] for row in result["rows"] if row["tokens"] == tokens}
        assert engines >= {"bitlab", "bitlab dense", *PEERS} - {left_out}
        assert left_out not in engines
    assert "| M | engine |" in output.with_suffix(".md").read_text()


@pytest.mark.ci
def test_a_whole_model(tmp_path: Path) -> None:
    output, work = tmp_path / "model.json", tmp_path / "models"
    done = processes.run(
        BENCH / "experts_model.py", "--quick", "--llama", "--threads", "1",
        "--work", work, "--json", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    ours, peer = result["engines"]
    assert (ours["engine"], peer["engine"]) == ("bitlab", "llama.cpp")
    size = result["geometry"]
    layers, experts = size["num_hidden_layers"], size["num_experts"]
    # Gate, up and down of every expert, four codes to a byte, are most of what the files hold.
    packed = layers * experts * 3 * size["hidden_size"] * size["moe_intermediate_size"] / 4
    assert packed < ours["file_bytes"] < 2 * packed
    assert ours["runs"][0]["layer"] == "BitQwen3MoeExperts"
    for one in (ours, peer):
        assert len(one["runs"][0]["token_seconds"]) == result["decode"] - 1
        assert 0 < one["decode_p10"] <= one["decode_tok_s"] <= one["decode_p90"]
        assert one["peak_bytes"] >= one["loaded_bytes"] > one["imported_bytes"]
    assert len(list((work / "quick-experts").glob("model-layer-*.safetensors"))) == layers
