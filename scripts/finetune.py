"""Quantization-aware fine-tuning of any causal language model, to a deployed ternary checkpoint.

    python scripts/finetune.py --model MODEL --data notes/*.txt --output out/mine
    accelerate launch scripts/finetune.py --model MODEL --data wikitext --data-config \
        wikitext-2-raw-v1 --output out/mine --push-to-hub me/mine-1.58bit

Latent checkpoints go to OUTPUT/checkpoints and are resumed from if a run is started again; the
deployed model, its tokenizer and the perplexity before and after go to OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from bitlab_hf import BitLabConfig, deploy, save


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a float model")
    parser.add_argument(
        "--data", required=True, nargs="+", help="text files, folders of them, or a datasets name"
    )
    parser.add_argument("--data-config", help="configuration of the dataset")
    parser.add_argument("--text-column", default="text", help="the dataset's text column")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--block", type=int, default=512, help="tokens of a training example")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step and process")
    parser.add_argument("--accumulate", type=int, default=1, help="steps of gradient accumulation")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of blocks to score")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--no-bf16", action="store_true", help="train in float32, no autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--weight-granularity", default="per_tensor")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--push-to-hub", metavar="REPO", help="hub repository for the result")
    parser.add_argument("--public", action="store_true", help="make a new hub repository public")
    arguments = parser.parse_args()
    if not 0 < arguments.held_out < 1:
        parser.error("--held-out must be between 0 and 1")
    return arguments


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """Returns the texts of the files or of the dataset's training split.

    Raises:
        SystemExit: Nothing was found, or the column is missing.
    """
    paths = [Path(name) for name in arguments.data]
    if all(path.exists() for path in paths):
        files = [
            file
            for path in paths
            for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])
        ]
        texts = [file.read_text(encoding="utf-8") for file in files]
    elif len(paths) == 1:
        from datasets import load_dataset

        dataset = load_dataset(arguments.data[0], arguments.data_config, split="train")
        if arguments.text_column not in dataset.column_names:
            raise SystemExit(
                f"--text-column must be one of {dataset.column_names}, "
                f"got {arguments.text_column!r}"
            )
        texts = list(dataset[arguments.text_column])
    else:
        missing = ", ".join(str(path) for path in paths if not path.exists())
        raise SystemExit(f"--data must name existing files or one dataset, got {missing}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise SystemExit("--data must hold text, got none")
    return texts


def make_examples(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int
) -> list[dict[str, torch.Tensor]]:
    """Concatenates the texts, an end token after each, and cuts them into blocks."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = list(chain.from_iterable([*ids, *end] for ids in encoded))
    count = len(stream) // length
    if count < 2:
        raise SystemExit(f"--data must hold at least {2 * length} tokens, got {len(stream)}")
    blocks = torch.tensor(stream[: count * length]).view(count, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    """Trains, evaluates, deploys, saves and pushes."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples = make_examples(tokenizer, read_texts(arguments), arguments.block)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(arguments.seed))
    held_out = max(1, int(arguments.held_out * len(examples)))
    shuffled = [examples[int(index)] for index in order]

    config = BitLabConfig(
        weight_granularity=arguments.weight_granularity, group_size=arguments.group_size
    )
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    checkpoints = arguments.output / "checkpoints"
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            gradient_accumulation_steps=arguments.accumulate,
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.warmup,
            adam_beta2=0.95,
            bf16=not arguments.no_bf16,
            use_cpu=arguments.cpu,
            save_steps=arguments.save_steps,
            save_total_limit=2,
            logging_steps=10,
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=shuffled[held_out:],
        eval_dataset=shuffled[:held_out],
    )
    before = trainer.evaluate()["eval_loss"]
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    after = trainer.evaluate()["eval_loss"]

    if trainer.is_world_process_zero():
        model = deploy(trainer.accelerator.unwrap_model(trainer.model))
        save(model, arguments.output, tokenizer=tokenizer)
        result = {
            "perplexity_ternarized_untrained": math.exp(before),
            "perplexity_trained": math.exp(after),
            "steps": trainer.state.global_step,
            "resumed_from": None if last is None else Path(last).name,
        }
        (arguments.output / "finetune.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
        if arguments.push_to_hub:
            private = not arguments.public
            model.push_to_hub(arguments.push_to_hub, private=private)
            tokenizer.push_to_hub(arguments.push_to_hub, private=private)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
