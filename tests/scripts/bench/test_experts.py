"""The benchmark of experts, on tiny layers: what it writes, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import processes

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
