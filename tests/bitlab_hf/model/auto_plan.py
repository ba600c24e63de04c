"""What a user runs under torchrun: a model loaded with ``tp_plan="auto"``; for `test_auto_plan`.

torchrun ... -m tests.bitlab_hf.model.auto_plan SOURCE DEPLOYED OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bitlab_hf import BitLabConfig
from bitlab_hf.model.parts import parts
from tests.bitlab_hf.models import token_ids, training_data
from tests.bitlab_hf.train.parallel import message


def main(source: Path, deployed: Path, out: Path) -> None:
    ids = token_ids()
    model = AutoModelForCausalLM.from_pretrained(deployed, tp_plan="auto")
    latent = AutoModelForCausalLM.from_pretrained(
        source, tp_plan="auto", quantization_config=BitLabConfig(weight_granularity="per_channel")
    )
    assert len(parts(model)) == len(parts(latent)) == 14
    with torch.no_grad():
        found = {
            "deployed": model.model(input_ids=ids).last_hidden_state,
            "latent": latent.model(input_ids=ids).last_hidden_state,
            "loss": latent.train()(input_ids=ids, labels=ids).loss,
        }
    found["tokens"] = model.generate(
        ids[:, :7], attention_mask=torch.ones_like(ids[:, :7]), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    arguments = TrainingArguments(str(out / "run"), use_cpu=True, report_to="none")
    said = message(lambda: Trainer(model=latent, args=arguments, train_dataset=training_data()))
    latent.save_pretrained(out / "latent")
    model.save_pretrained(out / "again")
    if os.environ["RANK"] == "0":
        save_file(found, out / "found.safetensors")
        (out / "trainer.txt").write_text(said)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
