"""``bitlab train``: quantization-aware fine-tuning on text, to a latent model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError
from bitlab_hf.cli.common import (
    Json,
    Output,
    Source,
    Threads,
    bars,
    check_output,
    check_trainable,
    emit,
    find_scheme,
    load_tokenizer,
    quiet,
    read_texts,
    set_threads,
)


def train(
    source: Source,
    output: Output,
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A text file; may be given repeatedly."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Or a dataset of the hub, its train split's column text.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="default, plain, distill, bitdistill, or a JSON file of a Recipe.")
    ] = "default",
    teacher: Annotated[
        str | None,
        typer.Option(help="A model, a folder of stored logits, or none. Default: MODEL itself."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps. Default: one pass over the text.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 512,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Largest one; a cosine.")] = 1e-4,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in OUTPUT.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the blocks.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fine-tunes a model to be ternary; `bitlab deploy` packs the result.

    Learns from MODEL itself as the teacher. Checkpoints and statistics go to OUTPUT/run.
    """
    from transformers import AutoModelForCausalLM, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from bitlab_hf import BitLabConfig, Facts, save
    from bitlab_hf.train import BitLabTrainer
    from bitlab_hf.train.logits import is_stored

    quiet()
    set_threads(threads)
    chosen = _recipe(recipe)
    check_output(source, output)
    check_trainable(source, "train")
    if teacher not in (None, "none") and not is_stored(teacher):
        # Of any scheme that transformers runs: a teacher need not be BitLab's.
        find_scheme(teacher)
    tokenizer = load_tokenizer(source)
    blocks = _blocks(tokenizer, text, dataset, length)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    run = output / "run"
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=steps or -1, num_train_epochs=1,
        per_device_train_batch_size=batch, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=0.05, bf16=bf16, seed=seed,
        save_steps=save_every, save_total_limit=2, logging_steps=10, disable_tqdm=True,
        report_to="none",
    )  # fmt: skip
    started = time.perf_counter()
    planned = steps or math.ceil(len(blocks) / batch)
    with _no_empty_folder(run), bars() as add:
        trainer = BitLabTrainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in blocks],
            recipe=chosen,
            teacher=None if teacher == "none" else teacher or source,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.calibration_progress = _calibrating(add)
        trainer.add_callback(_advancing(add, planned))
        trainer.train(resume_from_checkpoint=resume or None)
    data = dataset or ", ".join(file.name for file in text or ())
    # A path would say where things lie on this machine.
    base = None if Path(source).exists() else source
    facts = Facts(base_model=base, recipe=Path(recipe).name, data=data)
    save(model, output, tokenizer=tokenizer, facts=facts)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "output": str(output),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * batch * length,
        "loss": losses[-1] if losses else None,
        "seconds": time.perf_counter() - started,
    }
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
    emit(
        found,
        as_json,
        f"{output}: {found['steps']} steps{loss}, {found['seconds']:.0f} s\n"
        f"Pack it: bitlab deploy {output} DEPLOYED",
    )


def _recipe(given: str) -> Any:
    """Returns a recipe by its name or from a JSON file."""
    from bitlab_hf.train import Recipe
    from bitlab_hf.train.recipe import get_recipe

    if not given.endswith(".json"):
        return get_recipe(given)
    try:
        return Recipe.from_dict(json.loads(Path(given).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError(
            f"train: --recipe must be a name or a JSON file, got {given} ({error})"
        ) from error


def _blocks(tokenizer: Any, text: list[Path] | None, dataset: str | None, length: int) -> Any:
    """Returns the training text as token blocks [blocks, length]."""
    from bitlab_hf.demo.corpus import SourceFile
    from bitlab_hf.demo.text import make_blocks

    if (not text) == (dataset is None):
        raise typer.BadParameter("give either --text or --dataset", param_hint="--text")
    if dataset is None:
        files = read_texts(text or [])
    else:
        from datasets import load_dataset  # type: ignore[attr-defined]

        rows = load_dataset(dataset, split="train")
        if "text" not in rows.column_names:
            raise ArgumentError(f"train: --dataset must have a column text, got {dataset}")
        files = [SourceFile(dataset, row) for row in rows["text"] if row.strip()]
    try:
        return make_blocks(tokenizer, files, length).ids
    except ValueError as error:
        raise ArgumentError(f"train: {error}\nPass a smaller --length or more text.") from error


@contextmanager
def _no_empty_folder(run: Path) -> Iterator[None]:
    """Removes a run's folder, which a Trainer makes at once, where nothing came into it."""
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _calibrating(add: Any) -> Any:
    """Returns what shows the layers of a calibrated start."""
    shown: list[Any] = []

    def advance(_done: int, total: int, _name: str) -> None:
        if not shown:
            shown.append(add("calibrating", total))
        shown[0](1)

    return advance


def _advancing(add: Any, planned: int) -> Any:
    """Returns the callback that shows the steps of training."""
    from transformers import TrainerCallback

    class Advancing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance = add("training", planned)
            self.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance(1)
            # The last loss is the result's, however few steps there are.
            control.should_log = control.should_log or state.global_step == state.max_steps

    return Advancing()
