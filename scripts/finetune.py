"""Quantization-aware fine-tuning of any causal language model, to a deployed ternary checkpoint.

    python scripts/finetune.py --model MODEL --data notes/*.txt --output out/mine
    accelerate launch scripts/finetune.py --model MODEL --data Salesforce/wikitext --data-config \
        wikitext-2-raw-v1 --output out/mine

A float model gets a scale for each 128 inputs, or 64 where 128 does not divide, unless options of
the scheme say otherwise. The original model is the teacher. Latent checkpoints and statistics go to
OUTPUT/checkpoints and a run that is started again goes on from them, by hand or by torchrun's
``--max-restarts``; the deployed model goes to OUTPUT. On several machines OUTPUT is a folder that
all of them share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from bitcore.errors import BitLabError
from bitlab_hf import Facts, deploy, save
from bitlab_hf.cli.common import read_texts
from bitlab_hf.cli.loading import load_model, read_scheme
from bitlab_hf.cli.scheme import OPTIONS, pretrained_config
from bitlab_hf.model.groups import scales_in_words
from bitlab_hf.train import RECIPES, BitLabTrainer, last_checkpoint
from bitlab_hf.train.begun import blocks_mark, read_begun, scheme_fields, write_begun
from bitlab_hf.train.defaults import OPTIMIZER, batch_size
from bitlab_hf.train.floats import computes_in_bf16, round_floats, training_dtype

# What is read of a folder.
TEXTS = (".txt", ".jsonl")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a float model")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders, or a dataset")
    parser.add_argument("--data-config", help="configuration of the dataset")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--teach",
        action="store_true",
        help="the data is to be learned: the teacher learns it first",
    )
    parser.add_argument("--quant-warmup", type=float, default=0.0, help="share of the run")
    parser.add_argument("--block", type=int, default=512, help="tokens of a training example")
    parser.add_argument("--batch", type=int, help="examples of a step and process; default: 1 to 8")
    parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--optim", default="adamw_torch", help="such as adamw_bnb_8bit")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (autocast); default: on GPUs that have it",
    )
    scheme = parser.add_argument_group("scheme of a float model")
    for name, (kind, flags, text) in OPTIONS.items():
        several = {"action": "append"} if kind == list[str] else {"type": kind}
        scheme.add_argument(*flags, dest=name, help=text, **several)
    given = parser.parse_args()
    if given.block < 2:
        raise SystemExit(
            f"--block must be at least 2 tokens, got {given.block}\n"
            "A token is learned from those before it in its example."
        )
    return given


def read_blocks(tokenizer: Any, data: list[str], config: str | None, length: int) -> torch.Tensor:
    """Returns the text of files or of a dataset's train split as token blocks, shuffled."""
    paths = [Path(name) for name in data]
    if all(path.exists() for path in paths):
        files: list[Path] = []
        for path in paths:
            files += (
                sorted(f for f in path.rglob("*") if f.suffix in TEXTS) if path.is_dir() else [path]
            )
        texts = [file.text for file in read_texts(files, "--data")]
    elif len(paths) == 1:
        from datasets import load_dataset

        texts = list(load_dataset(data[0], config, split="train")["text"])
    else:
        missing = ", ".join(str(path) for path in paths if not path.exists())
        raise SystemExit(f"--data must name existing files or one dataset, got {missing}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        kinds = " or ".join(TEXTS)
        raise SystemExit(f"--data must hold text, got none\nOf folders, files in {kinds} are read.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in (*ids, *end)])
    count = len(stream) // length
    if count < 2:
        raise SystemExit(
            f"--data must hold at least {2 * length} tokens, got {len(stream)}\n"
            "Pass a smaller --block or more text."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return stream[: count * length].view(count, length)[order]


def check_restarts() -> None:
    """Refuses a restart by torchrun that would fail: by default the processes that it starts anew
    read from its store where those that have ended were to be reached.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise SystemExit(
            f"torchrun's --max-restarts must be 0 with a store of its own, got {restarts}\nSet "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; start with --standalone or --rdzv-backend c10d."
        )


def common_checkpoint(folder: str) -> str | None:
    """Returns the newest whole checkpoint of a run, which all processes have to see."""
    last = last_checkpoint(folder)
    names = set(gather_object([None if last is None else Path(last).name]))
    if len(names) > 1:
        seen = ", ".join(sorted(map(str, names)))
        raise SystemExit(f"--output must be a folder that all machines share, got {seen} in it")
    return last


def check_begun(given: argparse.Namespace, last: str | None, options: dict[str, Any]) -> None:
    """Lets a run go on only as it was begun; notes how, where it begins.

    Args:
        given: The command line.
        last: The checkpoint that it goes on from; None where it begins.
        options: The scheme, the text and the batch.
    """
    file = given.output / "checkpoints" / "bitlab_finetune.json"
    options |= {name: getattr(given, name) for name in ("learning_rate", "optim")}
    try:
        if last is not None:
            read_begun("finetune", file, options, f"remove {file.parent} to begin anew")
        elif int(os.environ.get("RANK", "0")) == 0:
            write_begun(file, options)
    except BitLabError as error:
        raise SystemExit(str(error)) from error


def main() -> None:
    """Trains, evaluates, deploys and saves."""
    given = parse_arguments()
    check_restarts()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    try:
        blocks = read_blocks(tokenizer, given.data, given.data_config, given.block)
    except BitLabError as error:
        raise SystemExit(str(error)) from error
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    held_out = max(1, len(examples) // 50)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = given.batch or batch_size(len(examples) - held_out, processes)

    scheme = {name: getattr(given, name) for name in OPTIONS if getattr(given, name) is not None}
    held = read_scheme(given.model)
    config = pretrained_config("finetune", scheme, held, given.model)
    chosen = "teach" if given.teach else "default"
    recipe = replace(RECIPES[chosen], quant_warmup=given.quant_warmup)
    warmed = f", warmed up over {given.quant_warmup} of the run" if given.quant_warmup else ""
    if int(os.environ.get("RANK", "0")) == 0:
        scales = "" if held is not None else f"scales of the weights: {scales_in_words(config)}; "
        does = f"{recipe.in_words(given.learning_rate)}{warmed}; {batch} examples a step"
        print(scales + does, file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
    dtype = AutoConfig.from_pretrained(given.model).dtype
    # Before the model is loaded, which fills it in.
    asked = scheme_fields(config) if held is None else {}
    model = load_model(given.model, quantization_config=config, dtype=training_dtype(config))
    checkpoints = str(given.output / "checkpoints")
    trainer = BitLabTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=checkpoints, per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch, num_train_epochs=1, max_steps=given.max_steps,
            learning_rate=given.learning_rate, optim=given.optim,
            bf16=computes_in_bf16(device, given.bf16), use_cpu=given.cpu,
            save_steps=given.save_steps, save_total_limit=2, logging_steps=10, report_to="none",
            **OPTIMIZER,
        ),
        train_dataset=examples[held_out:],
        eval_dataset=examples[:held_out],
        recipe=recipe,
        teacher=given.model,
    )  # fmt: skip
    last = common_checkpoint(checkpoints)
    check_begun(given, last, {**asked, "text": blocks_mark(blocks), "batch": batch})
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=last)
    after = trainer.evaluate()["eval_loss"]

    if trainer.is_world_process_zero():
        packed = deploy(trainer.accelerator.unwrap_model(model))
        round_floats(packed, dtype)
        key = f"held-out part of it: {held_out * given.block:,} tokens"
        names = ", ".join(Path(name).name for name in given.data)
        facts = Facts(recipe=chosen + warmed, data=names, perplexities={key: math.exp(after)})
        save(packed, given.output, tokenizer=tokenizer, facts=facts)
        result = {
            "perplexity_ternarized_untrained": math.exp(before),
            "perplexity_trained": math.exp(after),
            "steps": trainer.state.global_step,
            "resumed_from": None if last is None else Path(last).name,
        }
        (given.output / "finetune.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
