"""``bitlab train``: quantization-aware fine-tuning on text, to a latent model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError
from bitlab_hf.cli.common import (
    LEARNING_RATE,
    MOST,
    FloatSource,
    Json,
    Length,
    Output,
    Seed,
    Texts,
    Threads,
    bars,
    emit,
    finite,
    quiet,
    read_texts,
    set_threads,
)
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.gguf_source import as_folder
from bitlab_hf.cli.loading import (
    check_trainable,
    find_scheme,
    load_model,
    load_tokenizer,
    load_whole,
)
from bitlab_hf.cli.places import check_files, check_folder, check_output
from bitlab_hf.cli.scheme import OPTIONS, check_same, pretrained_config, with_scheme
from bitlab_hf.demo.terminal import printable

# What a run was begun with.
_BEGUN = "bitlab_train.json"


@with_scheme
def train(
    source: FloatSource,
    output: Output,
    text: Texts | None = None,
    dataset: Annotated[
        str | None, typer.Option(help="Or a dataset of the hub, its train split's column text.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="default, to keep what the model knows; teach, where the text is to be learned; "
            "plain, distill, bitdistill, or a JSON file of a Recipe."
        ),
    ] = "default",
    teacher: Annotated[
        str | None,
        typer.Option(help="A model, a folder of stored logits, or none. Default: MODEL itself."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Optimizer steps. Default: one pass over the text."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**16, help="Blocks a step. Default: what leaves 1000 steps, 1 to 8."
        ),
    ] = None,
    length: Length = 512,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Largest one; a cosine.")
    ] = LEARNING_RATE,
    save_every: Annotated[
        int, typer.Option(min=1, max=MOST, help="Steps between checkpoints.")
    ] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in OUTPUT.")
    ] = False,
    bf16: Annotated[
        bool | None,
        typer.Option(help="Compute in bfloat16 (autocast). Default: on GPUs that have it."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    *,
    scheme: dict[str, Any],
) -> None:
    """Fine-tunes a model to be ternary; `bitlab deploy` packs the result.

    A float model gets a scale for each 128 inputs, or 64 where 128 does not divide, which is
    trained with it, unless options of the scheme say otherwise. Learns from MODEL itself as the
    teacher. Checkpoints and statistics go to OUTPUT/run.
    """
    import torch
    from transformers import AutoConfig, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from bitlab_hf import Facts, save
    from bitlab_hf.model.groups import scales_in_words
    from bitlab_hf.train import BitLabTrainer
    from bitlab_hf.train.begun import blocks_mark, read_begun, scheme_fields, write_begun
    from bitlab_hf.train.defaults import OPTIMIZER, batch_size
    from bitlab_hf.train.floats import (
        computes_in_bf16,
        round_floats,
        teacher_dtype,
        training_dtype,
    )

    quiet()
    set_threads(threads)
    chosen = _recipe(recipe)
    check_output(source, output)
    held = check_trainable(source, "train")
    pretrained_config("train", scheme, held)
    run = output / "run"
    _check_teacher(teacher)
    with ExitStack() as folders:
        folder = folders.enter_context(as_folder(source))
        config = pretrained_config("train", scheme, held, folder)
        if resume:
            _check_resumed(run, config.to_dict() if held is None else scheme)
        scales = scales_in_words(config)
        tokenizer = load_tokenizer(folder)
        blocks = _blocks(tokenizer, text, dataset, length)
        batch = batch or batch_size(len(blocks))
        # Before a model is loaded, which fills the scheme in.
        begun = {
            "text": blocks_mark(blocks),
            "batch": batch,
            "seed": seed,
            "learning_rate": learning_rate,
            "teacher": Path(teacher or source).name,
            **(scheme_fields(config) if held is None else {}),
        }
        if resume:
            read_begun("train", run / _BEGUN, begun, "leave --resume out to begin anew")
        does = f"{chosen.in_words(learning_rate)}; {batch} blocks a step"
        typer.echo(printable(f"scales of the weights: {scales}; {does}"), err=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        judge = _teacher(teacher, folder, folders, chosen, tokenizer, teacher_dtype(device))
        dtype = AutoConfig.from_pretrained(folder).dtype
        model = load_model(folder, quantization_config=config, dtype=training_dtype(config))
        arguments = TrainingArguments(
            output_dir=str(run), max_steps=steps or -1, num_train_epochs=1,
            per_device_train_batch_size=batch, learning_rate=learning_rate,
            bf16=computes_in_bf16(device, bf16), seed=seed, save_steps=save_every,
            save_total_limit=2, logging_steps=10, disable_tqdm=True, report_to="none", **OPTIMIZER,
        )  # fmt: skip
        started = time.perf_counter()
        planned = steps or math.ceil(len(blocks) / batch)
        with _no_empty_folder(run), bars() as add, doing(f"training {source}"):
            trainer = BitLabTrainer(
                model=model,
                args=arguments,
                train_dataset=[{"input_ids": ids, "labels": ids} for ids in blocks],
                recipe=chosen,
                teacher=judge,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.calibration_progress = _calibrating(add)
            taught = round(chosen.teacher_share * planned)
            trainer.teacher_callbacks = [_advancing(add, "teaching the teacher", taught)]
            trainer.add_callback(_advancing(add, "training", planned))
            if not resume:
                write_begun(run / _BEGUN, begun)
            trainer.train(resume_from_checkpoint=resume or None)
    data = dataset or ", ".join(file.name for file in text or ())
    # A path would say where things lie on this machine.
    base = None if Path(source).exists() else source
    facts = Facts(base_model=base, recipe=Path(recipe).name, data=data)
    round_floats(model, dtype)
    with doing(f"writing {output}"):
        save(model, output, tokenizer=tokenizer, facts=facts)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "output": str(output),
        "scales": scales,
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


def _check_resumed(run: Path, scheme: dict[str, Any]) -> None:
    """Checks that a run goes on with the scheme that it began with.

    Raises:
        ArgumentError: A field is another one than in the newest checkpoint.
    """
    from bitlab_hf.train import last_checkpoint

    newest = last_checkpoint(run)
    if newest is None:
        return
    held = find_scheme(newest)
    fields = {name: scheme[name] for name in OPTIONS if scheme.get(name) is not None}
    check_same(f"train --resume of {newest}", fields, held or {})


def _check_teacher(teacher: str | None) -> None:
    from bitlab_hf.train.logits import is_stored

    if teacher in (None, "none"):
        return
    check_folder(Path(teacher))
    if not is_stored(teacher):
        # Of any scheme that transformers runs: a teacher need not be BitLab's.
        find_scheme(teacher)


def _teacher(
    given: str | None, folder: str, folders: ExitStack, recipe: Any, tokenizer: Any, dtype: Any
) -> Any:
    """Returns the teacher as the Trainer takes it: loaded whole, where it is loaded at all.

    Args:
        given: What --teacher says.
        folder: The model's own.
        folders: Keeps the one that a GGUF file is unpacked into.
        recipe: Which may do without, or want it in 8 bits.
        tokenizer: The model's.
        dtype: What it is loaded in.
    """
    from transformers import AutoModelForCausalLM

    from bitlab_hf.train.logits import is_stored
    from bitlab_hf.train.teacher import check_vocabulary

    if given == "none":
        return None
    if is_stored(given):
        return given
    name = folder if given is None else folders.enter_context(as_folder(given))
    if given is not None and recipe.distills:
        check_vocabulary("train", "--teacher", name, tokenizer)
    if recipe.teacher_8bit or not recipe.distills:
        return name
    return load_whole(AutoModelForCausalLM.from_pretrained, given or folder, name, dtype=dtype)


def _recipe(given: str) -> Any:
    """Returns a recipe by its name or from a JSON file."""
    from bitlab_hf.train import Recipe
    from bitlab_hf.train.recipe import get_recipe

    if not given.endswith(".json"):
        return get_recipe(given)
    check_files([Path(given)])
    with doing(f"reading {given}"):
        try:
            fields = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"train: --recipe must be a name or a JSON file, got {given} ({error})"
            ) from error
        return Recipe.from_dict(fields)


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

        with doing(f"loading the dataset {dataset}", "Check the name and the connection."):
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


def _advancing(add: Any, title: str, planned: int) -> Any:
    """Returns the callback that shows the steps of a training."""
    from transformers import TrainerCallback

    class Advancing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance = add(title, planned)
            self.advance(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance(1)
            # The last loss is the result's, however few steps there are.
            control.should_log = control.should_log or state.global_step == state.max_steps

    return Advancing()
