"""TRL's own trainers on ternary models: their losses are the model's, their references ternary."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

from bitcore.errors import LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.model.exposed import exposed_head, exposed_weight
from bitlab_hf.train import Recipe, sft_trainer
from bitlayers import BitLinear
from bitlayers.training import set_quant_strength
from tests.bitlab_hf.models import VOCABULARY, make_float_model, token_ids

LN2 = math.log(2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights of this size make losses that a rounded head changes by far more than a rounding.
    return make_float_model("llama", tmp_path_factory.mktemp("float"), initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def load(path: Path, mode: str = "train", **fields: Any) -> Any:
    config = BitLabConfig(mode=mode, **fields)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def text(seed: int, length: int = 8) -> str:
    return " ".join(f"w{(seed * 7 + i * 3) % (VOCABULARY - 4)}" for i in range(length))


def arguments(kind: Any, folder: Path, **fields: Any) -> Any:
    given = {
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    return kind(output_dir=str(folder), **given | fields)


def first_loss(trainer: Any) -> float:
    trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def pairs() -> Dataset:
    return Dataset.from_dict({
        "prompt": [text(i, 4) for i in range(8)],
        "chosen": [text(i + 1, 4) for i in range(8)],
        "rejected": [text(i + 3, 4) for i in range(8)],
    })  # fmt: skip


GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}
HEADS: dict[str, dict[str, Any]] = {
    "float": {},
    "ternary": {"head": "ternary"},
    "learned": {"head": "ternary", "weight_quantizer": "lsq"},
    "group": {"head": "ternary", **GROUPS},
    "group float32": {"head": "ternary", **GROUPS, "group_scale_dtype": "float32"},
    "learned group": {"head": "ternary", **GROUPS, "weight_quantizer": "lsq"},
    "twn group": {"head": "ternary", **GROUPS, "weight_quantizer": "twn"},
    "per tensor": {"head": "ternary", "activation_granularity": "per_tensor"},
    "float activations": {"head": "ternary", "activation_dtype": "float32"},
    "int8": {"head": "int8"},
}


@pytest.fixture(scope="module")
def latent(source: Path) -> Callable[[str], Any]:
    """Copies of the model with each head: a copy takes less than a load."""
    loaded = cache(lambda head: load(source, **HEADS[head]))
    return lambda head: copy.deepcopy(loaded(head))


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_sfts_first_loss_is_the_models(
    latent: Callable[[str], Any], tokenizer: Any, tmp_path: Path, head: str, deployed: bool
) -> None:
    """Of text that is tokenized already: TRL takes longer for that than for all the rest."""
    model = latent(head)
    if deployed:
        deploy(model)
    data = Dataset.from_dict(
        {"input_ids": [tokenizer(text(i, 5 + i))["input_ids"] for i in range(4)]}
    )
    for kind in (SFTTrainer, sft_trainer()):
        trainer = kind(
            model=copy.deepcopy(model),
            args=arguments(SFTConfig, tmp_path, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if deployed else None,
            **({} if kind is SFTTrainer else {"recipe": "plain"}),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        batch = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            expected = model.train()(**batch).loss.item()
        assert first_loss(trainer) == pytest.approx(expected, rel=2e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=2e-5)


def test_a_taught_teacher_learns_what_sft_learns(
    source: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Completions alone have labels, for the teacher too."""
    data = Dataset.from_dict({
        "prompt": [text(i, 6) for i in range(4)], "completion": [text(i + 1, 3) for i in range(4)],
    })  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(source)
    trainer = sft_trainer()(
        model=load(source),
        args=arguments(SFTConfig, tmp_path, max_length=16, learning_rate=1e-3),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        recipe=Recipe(0.0, 1.0, teacher_share=1.0),
        teacher=teacher,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    names = ("input_ids", "attention_mask", "labels")
    tuned = AutoModelForCausalLM.from_pretrained(source).train()
    tuned(**{name: batch[name] for name in names}).loss.backward()
    trainer.train()
    before = AutoModelForCausalLM.from_pretrained(source)
    for name, parameter in tuned.named_parameters():
        # The first step of AdamW moves a weight against its gradient's sign.
        moved = dict(teacher.named_parameters())[name] - dict(before.named_parameters())[name]
        large = parameter.grad.abs() > 1e-3 * parameter.grad.abs().max()
        assert torch.equal(moved[large].sign(), -parameter.grad[large].sign()), name


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("head", HEADS)
def test_a_fused_heads_gradients_are_the_models(
    latent: Callable[[str], Any], head: str, strength: float
) -> None:
    ids = token_ids()
    found: list[dict[str, Tensor]] = []
    losses = []
    for fused in (False, True):
        model = latent(head)
        set_quant_strength(model, strength)
        if fused:
            add_fused_lm_head(model)
            # A copy computes with its own head.
            model = copy.deepcopy(model)
            with torch.no_grad():
                model.lm_head.weight.add_(0)
        more = {"fused_lm_head": True} if fused else {}
        loss = model.train()(input_ids=ids, labels=ids, **more).loss
        loss.backward()
        losses.append(loss.item())
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(
            found[1][name], one, rtol=1e-3, atol=1e-5 + 1e-4 * one.abs().max().item()
        )


def test_outside_of_a_loss_the_head_is_as_ever(source: Path) -> None:
    model = load(source, head="ternary").train()
    plain, latent = model(input_ids=token_ids()), model.lm_head.weight
    with exposed_head(model):
        assert model.get_output_embeddings() is not model.lm_head
        seen = model.get_output_embeddings().weight
        assert len(seen.detach().unique()) == 3
        states = model.base_model(input_ids=token_ids()).last_hidden_state
        # Rounded activations times rounded weights are the head's logits.
        torch.testing.assert_close(states @ seen.t(), plain.logits, rtol=1e-4, atol=1e-4)
        # The model's own forward is the same, bit for bit.
        assert torch.equal(model(input_ids=token_ids()).logits, plain.logits)
        assert model.lm_head.weight is latent
    assert model.get_output_embeddings() is model.lm_head
    assert not model._forward_hooks
    assert not model.base_model._forward_hooks


def test_a_head_that_cannot_be_shown_is_refused(source: Path) -> None:
    class Other(BitLinear):
        pass

    model = load(source, head="ternary")
    model.lm_head.weight.ds_status = "NOT_AVAILABLE"
    with pytest.raises(LifecycleError, match='head must be .* whole weight .*\nUse head="keep"'):
        exposed_weight(model.lm_head)
    assert exposed_weight(Other(8, 4)).shape == (4, 8)


@pytest.mark.parametrize("made", ["loaded", "replaced", "latent file", "adapter"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_trl_loads_is_the_same_model(
    source: Path, tokenizer: Any, tmp_path: Path, made: str, kind: str
) -> None:
    model = load(source, head="ternary", weight_granularity="per_channel")
    if made == "replaced":
        model = replace_linear(AutoModelForCausalLM.from_pretrained(source))
    if made == "latent file":
        save(model, tmp_path / "latent")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "latent")
    adapter = LoraConfig(r=4, target_modules=["q_proj"]) if made == "adapter" else None
    data = pairs()
    given: dict[str, Any] = {"model": model, "processing_class": tokenizer, "peft_config": adapter}
    if kind == "dpo":
        args = arguments(DPOConfig, tmp_path / "run", max_length=24)
        trainer: Any = DPOTrainer(args=args, train_dataset=data, **given)
        assert first_loss(trainer) == pytest.approx(LN2, abs=1e-5)
    else:
        rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
                for i, r in enumerate(data)]  # fmt: skip
        args = arguments(KTOConfig, tmp_path / "run", max_length=24)
        trainer = KTOTrainer(args=args, train_dataset=Dataset.from_list(rows), **given)
        # sigmoid(0) of every example, wanted or not.
        assert first_loss(trainer) == pytest.approx(0.5, abs=1e-5)
    if adapter is None:
        theirs = {n: (type(m), repr(m)) for n, m in trainer.ref_model.named_modules()}
        ours = {n: (type(m), repr(m)) for n, m in model.named_modules()}
        leaves = [name for name, module in model.named_modules() if not list(module.children())]
        assert all(theirs[name] == ours[name] for name in leaves)


def test_grpos_reference_is_the_same_model(source: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load(source, head="ternary")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=arguments(GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, beta=0.04),
        train_dataset=Dataset.from_dict({"prompt": [text(i, 4) for i in range(8)]}),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.ref_model.lm_head, BitLinear)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl
    assert kl[0] == pytest.approx(0, abs=1e-6)


def test_a_string_and_a_float_policy_are_left_alone(
    source: Path, tokenizer: Any, tmp_path: Path
) -> None:
    for model in (str(source), AutoModelForCausalLM.from_pretrained(source)):
        args = arguments(DPOConfig, tmp_path, max_length=24)
        trainer = DPOTrainer(
            model=model, args=args, train_dataset=pairs(), processing_class=tokenizer
        )
        assert not any(isinstance(one, BitLinear) for one in trainer.ref_model.modules())
        assert first_loss(trainer) == pytest.approx(LN2, abs=1e-5)


@pytest.mark.parametrize("head", ["float", "ternary"])
def test_distillation_sees_the_student_as_it_computes(
    source: Path, tokenizer: Any, tmp_path: Path, head: str
) -> None:
    """A student that is its teacher, latent both, has nothing to learn."""
    student, teacher = load(source, **HEADS[head]), load(source, **HEADS[head])
    data = Dataset.from_dict({"prompt": [text(i, 4) for i in range(4)]})
    args = arguments(DistillationConfig, tmp_path, max_completion_length=5)
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    assert first_loss(trainer) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("order", [("bitlab_hf", "trl"), ("trl", "bitlab_hf")])
def test_the_order_of_imports_does_not_matter(order: tuple[str, str]) -> None:
    imports = {"trl": "from trl import SFTTrainer, DPOTrainer", "bitlab_hf": "import bitlab_hf"}
    script = "\n".join([
        *(imports[name] for name in order),
        "import sys",
        "for name in ('sft', 'dpo'):",
        "    module = sys.modules[f'trl.trainer.{name}_trainer']",
        "    assert module.add_fused_lm_head._bitlab_wrapped",
        "    assert module.create_model_from_path._bitlab_wrapped",
        "from trl.models.utils import _ForwardRedirection",
        "assert _ForwardRedirection.__call__._bitlab_wrapped",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
