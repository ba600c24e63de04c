"""``from_pretrained(..., tp_plan="auto")`` under torchrun, as the documentation has it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig, deploy, save
from tests.bitlab_hf.model.split import SIZES
from tests.bitlab_hf.models import make_float_model, token_ids
from tests.processes import ROOT, launch

pytestmark = pytest.mark.ci


def test_latent_and_deployed_models(tmp_path: Path) -> None:
    source, ids = make_float_model("llama", tmp_path, **SIZES), token_ids()
    config = BitLabConfig(weight_granularity="per_channel")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    with torch.no_grad():
        latent = model.model(input_ids=ids).last_hidden_state
        loss = model.train()(input_ids=ids, labels=ids).loss
    deployed = tmp_path / "deployed"
    save(deploy(model), deployed)
    tokens = model.generate(
        ids[:, :7], attention_mask=torch.ones_like(ids[:, :7]), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    done = launch(
        torchrun, "--standalone", "--nproc-per-node", "2", "-m", "tests.bitlab_hf.model.auto_plan",
        source, deployed, out, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = load_file(out / "found.safetensors")
    assert torch.equal(found["latent"], latent)
    assert torch.equal(found["deployed"], latent)
    assert torch.equal(found["tokens"], tokens)
    assert found["loss"] == loss
    for name, expected in (("latent", source), ("again", deployed)):
        one, two = (load_file(one / "model.safetensors") for one in (expected, out / name))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    # accelerate's, as for any model in parts on CPUs.
    assert "ParallelismConfig is only compatible" in (out / "trainer.txt").read_text()
