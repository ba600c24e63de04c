"""BitLabTrainer: distillation, its normalization, recipes on disk, and what stops a run."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bitcore.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError
from bitlab_hf import BitLabConfig
from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe, last_checkpoint, sft_trainer
from bitlab_hf.train.losses import logits_divergence, relation_divergence
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig())


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**values, **changes})


def make(source: Path, folder: Path, *, model: Any = None, **options: Any) -> BitLabTrainer:
    changes = {k: options.pop(k) for k in list(options) if k not in NAMES}
    data = options.pop("train_dataset", None) or training_data()
    return BitLabTrainer(
        model=load(source) if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=data,
        **options,
    )


DATA = ("train_dataset", "eval_dataset", "data_collator")
NAMES = ("recipe", "teacher", "callbacks", "statistics", *DATA)


def test_plain_is_the_trainer(source: Path, tmp_path: Path) -> None:
    plain = load(source)
    Trainer(model=plain, args=arguments(tmp_path), train_dataset=training_data()).train()
    for recipe in ("plain", Recipe(0.0, 1.0, calibration_samples=128)):
        ours = load(source)
        make(source, tmp_path, model=ours, recipe=recipe).train()
        assert_equal_states(state_of(plain), state_of(ours))


def keep(into: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    into[name] = parameter.grad.clone()


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for index in range(len(rows)):
        length = 24 - 5 * (int(batch["input_ids"][index, 0]) % 4)
        batch["attention_mask"][index, length:] = 0
        batch["labels"] = batch["labels"].clone()
        batch["labels"][index, length:] = -100
        batch["labels"][index, :3] = -100
    return batch


def test_the_loss_is_the_mean_over_labelled_tokens(source: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(source)
    recipe = Recipe(cross_entropy_weight=0.5, logits_weight=2.0, temperature=3.0)
    trainer = make(source, tmp_path, recipe=recipe, teacher=teacher, data_collator=padded)
    batch = padded(training_data(8))
    model = trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q = (model(**given).logits[:, :-1] / 3).log_softmax(-1)
        p = (teacher(**given).logits[:, :-1] / 3).log_softmax(-1)
        ce = model(**batch).loss
    kept = batch["labels"][:, 1:] != -100
    divergence = (p.exp() * (p - q)).sum(-1)[kept].mean() * 9
    torch.testing.assert_close(loss, 0.5 * ce + 2 * divergence)
    # A teacher changes nothing in evaluation: losses of different recipes can be compared.
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(batch)), model(**batch).loss)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(logits_weight=1.0, hidden_weight=0.5),
        Recipe(cross_entropy_weight=0.0, logits_weight=1.0, temperature=2.0),
    ],
    ids=["labels, logits, hidden states", "logits alone"],
)
def test_accumulation_is_one_large_batch(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    gradients = []
    for size, count in ((8, 1), (2, 4)):
        trainer = make(
            source, tmp_path, recipe=recipe, teacher=str(source), data_collator=padded,
            train_dataset=training_data(8), per_device_train_batch_size=size,
            gradient_accumulation_steps=count, max_steps=1, learning_rate=0.0, max_grad_norm=0.0,
        )  # fmt: skip
        kept: dict[str, Tensor] = {}
        model: Any = trainer.model
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(keep, kept, name))
        trainer.train()
        gradients.append(kept)
    for name, gradient in gradients[0].items():
        difference = (gradient - gradients[1][name]).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-7, name


def test_logged_terms_add_up_to_the_loss(source: Path, tmp_path: Path) -> None:
    """Also where the last optimizer step of an epoch has fewer batches than the others."""
    recipe = Recipe(cross_entropy_weight=0.5, logits_weight=2.0)
    trainer = make(
        source, tmp_path, recipe=recipe, teacher=source, train_dataset=training_data(10),
        per_device_train_batch_size=2, gradient_accumulation_steps=4, logging_steps=3, max_steps=6,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6]
    for entry in logs:
        expected = 0.5 * entry["loss_ce"] + 2 * entry["loss_logits"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)


def test_learned_scales_do_not_decay(source: Path, tmp_path: Path) -> None:
    config = BitLabConfig(weight_quantizer="lsq")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    trainer = make(source, tmp_path, model=model, recipe="plain", weight_decay=0.1)
    decayed = trainer.get_decay_parameter_names(model)
    assert "model.layers.0.mlp.up_proj.weight" in decayed
    assert not any("learned_scale" in name for name in decayed)


def test_every_term_trains_and_is_logged(source: Path, tmp_path: Path) -> None:
    # Random labels pull away from the teacher: their weight is small.
    recipe = Recipe(
        cross_entropy_weight=1e-3,
        logits_weight=1.0,
        hidden_weight=1.0,
        relation_weight=1.0,
        relation_heads=4,
        temperature=2.0,
    )
    teacher = AutoModelForCausalLM.from_pretrained(source)
    before = state_of(teacher)
    trainer = make(source, tmp_path, recipe=recipe, teacher=teacher, max_steps=12, bf16=True,
                   gradient_checkpointing=True)  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss_ce", "loss_logits", "loss_hidden", "loss_relation"):
        assert all(math.isfinite(entry[name]) for entry in logs)
    for name in ("loss_logits", "loss_relation"):
        assert logs[-1][name] < logs[0][name]
    first = logs[0]
    terms = 1e-3 * first["loss_ce"]
    terms += sum(first[f"loss_{name}"] for name in ("logits", "hidden", "relation"))
    assert first["loss"] == pytest.approx(terms, rel=1e-3)
    assert_equal_states(before, state_of(teacher))
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sft_trainer_learns_from_the_teacher(source: Path, tmp_path: Path) -> None:
    """TRL's trainer, whose loss may leave logits out: the logged divergence is the direct one."""
    from datasets import Dataset
    from trl import SFTConfig

    rows = [{"input_ids": row["input_ids"].tolist()} for row in training_data(4)]
    model, teacher = load(source), AutoModelForCausalLM.from_pretrained(source)
    vocabulary = {f"w{index}": index for index in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
    )
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        p, q = (m.train()(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    options = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True}
    trainer = sft_trainer()(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), report_to="none", save_strategy="no", bf16=False,
            per_device_train_batch_size=4, gradient_checkpointing=False, **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        recipe="distill",
        teacher=teacher,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_logits" in entry]
    assert logs[0]["loss_logits"] == pytest.approx(float(expected), rel=1e-4)
    assert logs[1]["loss_logits"] < logs[0]["loss_logits"]


def test_eight_bits(source: Path, tmp_path: Path) -> None:
    """bitsandbytes on the CPU: the teacher's layers, and the optimizer's state."""
    first = []
    for eight in (False, True):
        recipe = Recipe(cross_entropy_weight=0.0, logits_weight=1.0, teacher_8bit=eight)
        optim = "adamw_bnb_8bit" if eight else "adamw_torch"
        trainer = make(source, tmp_path, recipe=recipe, teacher=str(source), optim=optim)
        names = {type(module).__name__ for module in trainer._teacher.modules()}
        assert ("Linear8bitLt" in names) == eight
        trainer.train()
        optimizer: Any = trainer.optimizer
        assert type(optimizer.optimizer).__module__.startswith("bitsandbytes") == eight
        first.append(trainer.state.log_history[0]["loss_logits"])
    assert first[1] == pytest.approx(first[0], rel=0.25)


def test_divergences() -> None:
    student = torch.randn(700, 30, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(700, 30, dtype=torch.float64)
    loss = logits_divergence(student, teacher, 2.0)
    loss.backward()
    other = student.detach().clone().requires_grad_()
    p, q = (teacher / 2).log_softmax(-1), (other / 2).log_softmax(-1)
    expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, other.grad, rtol=1e-4, atol=1e-7)
    states, mask = torch.randn(2, 6, 8), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert relation_divergence(states, states.clone(), mask, 2).item() == 0
    changed = states.clone()
    changed[1, 4:] = 100.0
    # Padding takes no part.
    assert relation_divergence(changed, states, mask, 2).item() == 0
    assert relation_divergence(states + 1, states, mask, 2).item() > 0


def test_resuming(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "default", "teacher": source}
    straight = load(source)
    make(source, tmp_path / "straight", model=straight, **options).train()
    saving = {"save_strategy": "steps", "save_steps": 2, **options}
    make(source, tmp_path / "run", **saving).train()
    assert Recipe.load(tmp_path / "run" / "checkpoint-2") == RECIPES["default"]
    other = {**saving, "recipe": Recipe(logits_weight=0.5)}
    with pytest.raises(CheckpointError, match=r"logits_weight=0\.5 \(was 1\.0\)"):
        make(source, tmp_path / "run", **other).train(resume_from_checkpoint=True)
    # Killed while it saved step 4: half a folder, which is passed over.
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text("{")
    resumed = load(source)
    trainer = make(source, tmp_path / "run", model=resumed, **saving)
    assert str(last_checkpoint(tmp_path / "run")).endswith("checkpoint-2")
    trainer.train(resume_from_checkpoint=True)
    assert_equal_states(state_of(straight), state_of(resumed))
    with pytest.raises(CheckpointError, match="none that is whole"):
        make(source, tmp_path / "empty", **saving).train(resume_from_checkpoint=True)


class FullDisk(TrainerCallback):
    """From a step on, no file can grow beyond 64 KiB: what is larger fails while it is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))


@pytest.fixture
def file_sizes() -> Iterator[None]:
    """Puts the limit of file sizes back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_sizes")
def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"recipe": "plain", "save_strategy": "steps", "save_steps": 2}
    trainer = make(source, tmp_path, callbacks=[FullDisk(3)], **saving)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 must be written(.|\n)*checkpoint-2"):
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoint-2"}
    make(source, tmp_path, **saving).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4").is_dir()


class _Poison(torch.nn.Module):
    """Turns an output to NaN from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return x if self.left >= 0 else x * math.nan


def test_a_loss_that_is_not_finite(source: Path, tmp_path: Path) -> None:
    model = load(source)
    model.model.layers[1].mlp.act_fn = _Poison(3)
    trainer = make(
        source, tmp_path, model=model, recipe="plain", save_strategy="steps", save_steps=2
    )
    with pytest.raises(
        NonFiniteError, match=r"loss of step 4(.|\n)*activations of model\.layers\.1\.mlp\.act_fn"
    ) as caught:
        trainer.train()
    assert "checkpoint-2" in str(caught.value)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    broken = load(source)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 5] = math.inf
    with pytest.raises(NonFiniteError, match=r"scale\) of model\.layers\.0\.mlp\.up_proj"):
        make(source, tmp_path, model=broken, recipe="plain").train()


def test_a_gradient_that_is_not_finite(source: Path, tmp_path: Path) -> None:
    model = load(source)
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError, match=r"gradient of model\.layers\.1\.self_attn\.q_proj"):
        make(source, tmp_path, model=model, recipe="plain").train()
    assert bool(torch.isfinite(layer.weight).all())


def test_teachers_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    other = make_float_model("llama", tmp_path, vocab_size=101)
    with pytest.raises(ArgumentError, match="vocabulary of 97 tokens, got one of 101"):
        make(source, tmp_path, teacher=other)
    model = load(source)
    with pytest.raises(ArgumentError, match="a model of its own"):
        make(source, tmp_path, model=model, teacher=model)
    with pytest.raises(ArgumentError, match="teacher must be given"):
        make(source, tmp_path, recipe="distill")
    with pytest.raises(ArgumentError, match="among the model's 2, got 7"):
        make(source, tmp_path, teacher=source, recipe=Recipe(relation_weight=1, relation_layer=7))
    with pytest.raises(ArgumentError, match="recipe must be a Recipe or one of"):
        make(source, tmp_path, recipe="nonsense")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip(name: str) -> None:
    assert Recipe.from_dict(RECIPES[name].to_dict()) == RECIPES[name]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"logits_weight": -1.0},
        {"hidden_weight": math.nan},
        {"cross_entropy_weight": 0.0},
        {"hidden_layers": ()},
        {"relation_heads": 0},
        {"guard": 1},
        {"unknown": 1},
    ],
    ids=str,
)
def test_bad_recipes(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Recipe: .*{next(iter(fields))}"):
        Recipe.from_dict(fields)
