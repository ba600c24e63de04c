"""Two processes that share a model's layers or experts, against one: packed inference, training,
saving.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.bitlab_hf.model.split import SCHEMES
from tests.bitlab_hf.models import counts_of
from tests.processes import run_once

pytestmark = pytest.mark.ci
# Gradients of inputs are added up over processes, in float32.
ROUNDING = 1e-6
# Sums of groups with a scale each are floats; so are parts of a token that are reduced, where it
# has three experts.
FLOATS = ("floats", "grouped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once("tests.bitlab_hf.model.split", tmp_path_factory)


def both(runs: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    one, two = (load_file(runs / f"{name}-{count}.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    return one, two


@pytest.mark.parametrize("name", SCHEMES)
def test_a_deployed_model_gives_the_bits_of_one_process(runs: Path, name: str) -> None:
    one, two = both(runs, name)
    assert torch.equal(one["tokens"], two["tokens"])
    if name in FLOATS:
        torch.testing.assert_close(two["hidden"], one["hidden"], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(one["hidden"], two["hidden"])
    # A float head is torch's own product, of half of the rows in each process.
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-6)
    if SCHEMES[name][1].get("head") == "int8":
        assert torch.equal(one["logits"], two["logits"])


@pytest.mark.parametrize("name", ["channel", "dispatched"])
def test_packed_at_load(runs: Path, name: str) -> None:
    one, two = both(runs, f"{name}-at-load")
    for what in ("hidden", "tokens"):
        assert torch.equal(one[what], two[what])


@pytest.mark.parametrize("name", SCHEMES)
def test_training_takes_the_steps_of_one_process(runs: Path, name: str) -> None:
    """The first loss bit for bit; what follows differs by the rounding of the gradients, and by a
    code that lies this near to its threshold.
    """
    one, two = both(runs, f"{name}-trained")
    if name in FLOATS:
        torch.testing.assert_close(two["losses"][0], one["losses"][0], rtol=ROUNDING, atol=0)
    else:
        assert two["losses"][0] == one["losses"][0]
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=0)
    assert one["losses"][-1] < one["losses"][0]
    gradients = {key for key in one if key.startswith("grad.")}
    largest = max(one[key].norm() for key in gradients)
    for key in gradients:
        # The gradient of a bias of keys is 0 but for rounding.
        allowed = ROUNDING * max(float(one[key].norm()), 1e-2 * float(largest))
        assert (two[key] - one[key]).norm() <= allowed, key


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("way", ["again", "plain"])
def test_a_deployed_model_is_saved_whole(runs: Path, name: str, way: str) -> None:
    """By `save` and by `save_pretrained`: the tensors and the configuration of one process."""
    expected = load_file(runs / name / "model.safetensors")
    found = load_file(runs / f"{name}-{way}-2" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    texts = {
        (folder / "config.json").read_text() for folder in (runs / name, runs / f"{name}-{way}-2")
    }
    assert len(texts) == 1
    if way == "again":
        assert counts_of(runs / f"{name}-again-2") == counts_of(runs / name)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_latent_model_is_saved_whole(runs: Path, name: str) -> None:
    one, two = (
        load_file(runs / f"{name}-latent-{count}" / "model.safetensors") for count in (1, 2)
    )
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert two[key].shape == tensor.shape
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=2e-3)


def test_what_is_not_ours_is_refused(runs: Path) -> None:
    for rank in range(2):
        said = json.loads((runs / f"messages-{rank}.json").read_text())
        assert "model must be whole in one process" in said["dequantize"]
        assert "model must be whole in one process" in said["export"]
        assert "must be a whole, plain tensor, got a sharded" in said["deploy"]
        assert "tp_plan must be the model's own, got {" in said["plan"]
        assert "tp_plan must be the model's own, got {}" in said["no plan"]
        assert "ep_plan must be the model's own, got {" in said["expert plan"]
        assert "must be a whole, plain tensor, got a sharded" in said["experts deploy"]
        whole = "model must be whole in one process, got model.layers.0.block_sparse_moe.experts"
        assert whole in said["experts dequantize"]
        assert "weight_quantizer of model.layers.0.self_attn.q_proj must be" in said["learned"]
        assert "must leave whole groups of 128 inputs" in said["groups"]
        assert "down_proj must be a BitLinear in tensor parallel" in said["norm"]
        assert "ep_size must divide the number of experts of" in said["odd"]
        assert "tp_size must divide num_key_value_heads, got 2 for 1" in said["heads"]
        assert all(text.count("\n") <= 1 for text in said.values())
