"""LoRA on a deployed ternary model: train, save, load again bit for bit, merge with the drift.

python scripts/finetune_lora.py --model out/mine --data notes.txt --output out/adapter
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bitlab_hf import merge_and_requantize, save


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a deployed model")
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="text files")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--block", type=int, default=512, help="tokens of a training example")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    return parser.parse_args()


def main() -> None:
    """Trains an adapter, checks that it comes back as it was, and merges a copy."""
    given = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = "\n".join(file.read_text(encoding="utf-8") for file in given.data)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // given.block
    if count == 0:
        raise SystemExit(f"--data must hold at least {given.block} tokens, got {len(ids)}")
    blocks = ids[: count * given.block].view(count, given.block)

    base = AutoModelForCausalLM.from_pretrained(given.model)
    config = LoraConfig(r=given.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(given.output / "checkpoints"), max_steps=given.max_steps,
            per_device_train_batch_size=given.batch, learning_rate=given.learning_rate,
            use_cpu=given.cpu, save_strategy="no", logging_steps=1, report_to="none",
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(given.output / "adapter")

    batch = {"input_ids": blocks[:1].to(model.device)}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        again: Any = AutoModelForCausalLM.from_pretrained(given.model).to(model.device)
        again = PeftModel.from_pretrained(again, given.output / "adapter").eval()
        equal = torch.equal(again(**batch).logits, expected)

    merged = merge_and_requantize(again, batches=[batch])  # prints the drift
    save(merged.model, given.output / "merged", tokenizer=tokenizer)
    result = {"first_loss": losses[0], "last_loss": losses[-1], "reloaded_bit_for_bit": equal}
    print(json.dumps(result))
    if not equal:
        raise SystemExit("the reloaded adapter must give the same logits, got others")


if __name__ == "__main__":
    main()
