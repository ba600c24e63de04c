"""The main job end to end: a pretrained language model in, a ternary one out, and the proof.

Every figure of the closing table is measured in the run; `report.json` beside the model holds them
all.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bitcore.errors import MissingExtraError
from bitlab_hf.checkpoint.saving import save
from bitlab_hf.config import BitLabConfig
from bitlab_hf.demo.begun import bf16_is_faster, forget, read_begun, text_mark, write_begun
from bitlab_hf.demo.corpus import read_articles, source_files
from bitlab_hf.demo.probe import Answer, probe
from bitlab_hf.demo.report import PROMPTS, Report, show_table, show_texts
from bitlab_hf.demo.text import Blocks, Perplexity, make_blocks, measure_perplexity
from bitlab_hf.model.deploy import deploy
from bitlab_hf.model.groups import scales_in_words
from bitlab_hf.train import RECIPES, BitLabTrainer, record_baseline
from bitlab_hf.train.begun import scheme_fields
from bitlab_hf.train.defaults import OPTIMIZER, batch_size
from bitlab_hf.train.floats import round_floats
from bitlab_hf.train.guard import has_begun

# How often the ternary model is evaluated in training, and on which part of the held-out blocks.
EVALUATIONS, EVALUATED = 8, 5
# The model that ships with BitLab.
BUNDLED = str(files("bitlab_hf.demo") / "model")
# How often a long training is saved, and how many words of an article are continued.
SAVES, _PROMPT_WORDS = 20, 12


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        model: What the original is called; None for the model that ships with BitLab.
        output: Folder for the ternary model and the report.
        tokens: Training tokens of each of the two fine-tunings.
        eval_tokens: Held-out tokens to score.
        length: Tokens of a block.
        learning_rate: Its peak learning rate.
        float_batch: Blocks of a training step of the full-precision model.
        float_learning_rate: Its peak learning rate.
        generate: Tokens to generate for each prompt.
        seed: Of the order of the training blocks.
        folder: Its folder, where that is not what it is called.
        text: A folder of articles to train and score on; see `read_articles`. The full-precision
            model is not fine-tuned then. None for the standard library's sources.
        resume: Whether to go on with a run that was killed, which was begun with the same.
        config: How it is made ternary.
    """

    model: str | None
    output: Path
    tokens: int = 500_000
    eval_tokens: int = 100_000
    length: int = 512
    learning_rate: float = 2e-4
    float_batch: int = 8
    float_learning_rate: float = 1e-4
    generate: int = 64
    seed: int = 0
    folder: str | None = None
    text: Path | None = None
    resume: bool = False
    config: BitLabConfig = field(default_factory=BitLabConfig)

    def trains(self) -> dict[str, Any]:
        """Returns what makes two trainings of the ternary model the same, by name."""
        names = ("model", "tokens", "length", "learning_rate", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "batch": batch_size(self.tokens // self.length),
            "text": text_mark(self.text),
            **scheme_fields(self.config),
        }


class _Bars(TrainerCallback):
    """Shows a Trainer's steps and loss on a progress bar."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self._progress.add_task(self._title, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and self._task is not None:
            text = f"{self._title}, loss {float(logs['loss']):.3f}"
            self._progress.update(self._task, description=text)


class Demo:
    """One run; `run` does all of it.

    Args:
        settings: What it does.
        console: Where it shows itself.
        load: Loads a causal language model from a folder or hub name, whole or not at all; takes
            the options of ``from_pretrained``.

    Raises:
        ArgumentError: A run is to go on that was begun with other settings.
        CheckpointError: What it was begun with cannot be read.
    """

    def __init__(self, settings: Settings, console: Console, load: Callable[..., Any]) -> None:
        self._settings = settings
        self._console = console
        self._load = load
        self._run = settings.output / "run"
        # Before any model is loaded, which fills the scheme in.
        self._options = settings.trains()
        begun = read_begun(self._run, self._options) if settings.resume else None
        self._bf16 = bf16_is_faster() if begun is None else begun
        # The Trainer insists on a folder, though it is told to save nothing.
        self._scratch = tempfile.TemporaryDirectory()
        self._report = Report(settings.model or "the model that ships with BitLab", 0, "")

    @contextmanager
    def _stage(self, number: int, title: str) -> Iterator[Progress]:
        self._console.print(f"[bold]({number}/6)[/bold] {title}")
        started = time.perf_counter()
        columns = (
            TextColumn("      {task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield progress
        self._report.seconds[title] = time.perf_counter() - started

    def run(self) -> Report:
        """Runs the six stages and prints the table; returns what was measured.

        Raises:
            RuntimeError: The reloaded model's logits differ from the deployed one's.
        """
        settings, report = self._settings, self._report
        _require_accelerate()
        report.threads = torch.get_num_threads()
        report.isa = _isa()
        original = settings.folder or settings.model or BUNDLED
        self._console.print(
            f"Model: {report.model}. Device: CPU, {report.threads} threads, {report.isa}; "
            f"training in {'bfloat16 autocast' if self._bf16 else 'float32'}. "
            f"Scales of the weights: {scales_in_words(settings.config)}. The ternary model is "
            f"{RECIPES['default'].in_words(settings.learning_rate)}.",
            markup=False,
        )
        with self._stage(1, "The original model and its text") as progress:
            tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=False)
            model = self._load(original, dtype=torch.float32)
            train, heldout = self._blocks(tokenizer, progress)
        with self._stage(2, "Perplexity before any training") as progress:
            report.original = self._perplexity(model, heldout, progress, "original")
            rounded = deploy(self._latent(original))
            report.rounded = self._perplexity(rounded, heldout, progress, "ternarized, untrained")
            del rounded
        beside = "" if settings.text is not None else ", and in full precision"
        with self._stage(3, f"Fine-tuning: quantization-aware{beside}") as progress:
            ternary = self._latent(original)
            if not settings.resume:
                forget(self._run)
            write_begun(self._run, self._options, self._bf16)
            self._train(ternary, train, progress, "ternary", teacher=model, watched=heldout)
            if settings.text is None:
                # A teacher is frozen.
                model.requires_grad_(True)
                self._train(model, train, progress, "full precision")
                report.finetuned = self._perplexity(model, heldout, progress, "full precision")
            del model
        with self._stage(4, "Deploy and save") as progress:
            dtype = self._load(original).dtype
            round_floats(deploy(ternary), dtype)
            report.ternary = self._perplexity(ternary, heldout, progress, "deployed")
            save(ternary, settings.output, tokenizer=tokenizer)
        with self._stage(5, "Load in fresh processes") as progress:
            ids = heldout.ids[:1]
            with torch.no_grad():
                expected = ternary(input_ids=ids).logits
            report.original_probe, _ = self._probe(progress, Path(original), ids)
            report.ternary_probe, logits = self._probe(progress, settings.output, ids)
            report.logits_identical = torch.equal(expected, logits)
            report.original_bytes = _weight_bytes(original)
            report.ternary_bytes = _weight_bytes(str(settings.output))
        best = report.original if report.finetuned is None else report.finetuned
        report.ratio = report.ternary.value / min(report.original.value, best.value)
        with self._stage(6, "The result"):
            show_texts(report, self._console)
        show_table(report, self._console, settings.output)
        (settings.output / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        # Not before: a run that is killed meanwhile goes on from the last step.
        forget(self._run)
        if not report.logits_identical:
            raise RuntimeError("the logits of the fresh process differ from the deployed model's")
        return report

    def _latent(self, original: str) -> Any:
        return self._load(original, dtype=torch.float32, quantization_config=self._settings.config)

    def _blocks(self, tokenizer: Any, progress: Progress) -> tuple[Blocks, Blocks]:
        settings = self._settings
        task = progress.add_task("tokenize", total=2)
        if settings.text is None:
            train_files, heldout_files = list(source_files("train")), list(source_files("heldout"))
        else:
            train_files = read_articles(settings.text, "fit")
            heldout_files = read_articles(settings.text, "test")
            # How the first ones begin: nobody has chosen these.
            begun = [" ".join(file.text.split()[:_PROMPT_WORDS]) for file in heldout_files]
            self._report.prompts = tuple(begun[: len(PROMPTS)])
        random.Random(settings.seed).shuffle(train_files)
        train = make_blocks(tokenizer, train_files, settings.length)
        progress.advance(task)
        heldout = make_blocks(tokenizer, heldout_files, settings.length)
        progress.advance(task)
        order = torch.randperm(
            len(train.ids), generator=torch.Generator().manual_seed(settings.seed)
        )
        used = order[: max(1, settings.tokens // settings.length)]
        train = Blocks(train.ids[used], train.bytes_per_token)
        heldout = heldout.first(settings.eval_tokens)
        self._report.train_tokens = train.ids.numel()
        self._report.heldout_tokens = heldout.ids.numel()
        return train, heldout

    def _perplexity(
        self, model: Any, heldout: Blocks, progress: Progress, title: str
    ) -> Perplexity:
        task = progress.add_task(f"perplexity: {title}", total=len(heldout.ids))
        return measure_perplexity(
            model, heldout, advance=lambda count: progress.advance(task, count)
        )

    def _train(
        self,
        model: Any,
        train: Blocks,
        progress: Progress,
        title: str,
        teacher: Any = None,
        watched: Blocks | None = None,
    ) -> None:
        settings = self._settings
        ternary = teacher is not None
        arguments = TrainingArguments(
            output_dir=str(self._run) if ternary else self._scratch.name,
            run_name="The demo" if settings.model is None else settings.model,
            per_device_train_batch_size=batch_size(len(train.ids))
            if ternary
            else settings.float_batch,
            num_train_epochs=1,
            learning_rate=settings.learning_rate if ternary else settings.float_learning_rate,
            bf16=self._bf16,
            use_cpu=True,
            seed=settings.seed,
            save_strategy="steps" if ternary and settings.text is not None else "no",
            save_steps=1 / SAVES,
            save_total_limit=1,
            report_to="none",
            logging_steps=5,
            disable_tqdm=True,
            eval_strategy="no" if watched is None else "steps",
            eval_steps=1 / EVALUATIONS,
            per_device_eval_batch_size=8,
            include_num_input_tokens_seen=True,
            **OPTIMIZER,
        )
        common = {
            "model": model,
            "args": arguments,
            "train_dataset": _examples(train.ids),
            "eval_dataset": None if watched is None else _examples(watched.ids[::EVALUATED]),
            "callbacks": [_Bars(progress, title)],
            "statistics": watched is not None,
        }
        recipe = "default" if ternary else "plain"
        trainer = BitLabTrainer(**common, recipe=recipe, teacher=teacher)
        trainer.calibration_progress = _calibrating(progress)
        trainer.remove_callback(PrinterCallback)
        if watched is not None:
            record_baseline(trainer, teacher, "original")
            trainer.recipe.save(self._run)
            trainer.evaluate()
        held = has_begun(arguments)
        trainer.train(resume_from_checkpoint=(ternary and settings.resume and held) or None)
        if watched is not None:
            trainer.save_state()

    def _probe(self, progress: Progress, model: Path, ids: Any) -> tuple[Answer, torch.Tensor]:
        name = "ternary" if model == self._settings.output else "original"
        task = progress.add_task(f"load, compare, generate: {name}", total=1)
        result = probe(
            model, ids, list(self._report.prompts), self._settings.generate, self._report.threads
        )
        progress.advance(task)
        return result


def _calibrating(progress: Progress) -> Callable[[int, int, str], None]:
    """Returns what shows the layers of a calibrated start."""
    task = progress.add_task("calibrated start", total=None, visible=False)

    def advance(done: int, total: int, _name: str) -> None:
        progress.update(task, completed=done, total=total, visible=True)

    return advance


def _examples(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": block, "labels": block} for block in ids]


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "bitlab demo: the extra 'train' must be installed, got no accelerate\n"
            'In BitLab\'s clone, run `pip install ".[train]"`.'
        ) from error


def _isa() -> str:
    from bitcore.kernels import kernels_for

    return str(getattr(kernels_for("cpu"), "isa", "torch reference"))


def _weight_bytes(model: str) -> int:
    folder = Path(model)
    return (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    )
