"""What PEFT may train of a model with packed layers beside adapters: heads, tokens, biases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM

from bitcore.errors import LifecycleError
from bitlab_hf import BitLabConfig, merge_and_requantize
from bitlab_hf.model.int8 import int8_modules
from tests.bitlab_hf.models import logits_of, make_float_model, token_ids
from tests.bitlab_hf.ternary import make_packed


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own, and one with a head that is tied."""
    return make_float_model(request.param, tmp_path_factory.mktemp("float"))


def load(path: Path, mode: str = "infer", **fields: Any) -> Any:
    config = BitLabConfig(mode=mode, **fields)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **fields})


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def shape_of(model: Any) -> list[tuple[str, type, bool]]:
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return modules + [(n, type(p), p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["down_proj"]}, r"modules_to_save: model.layers.0.mlp.down_proj must"),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save: model.layers.0.mlp.gate_proj must"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: lm_head must be a float .* int8 one"),
        ({"trainable_token_indices": {"lm_head": [5]}}, "trainable_token_indices: lm_head must"),
        ({"target_parameters": ["down_proj.qweight"]}, "LORA: .*down_proj.qweight must have float"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_changes(
    source: Path, fields: dict[str, Any], message: str
) -> None:
    model = load(source, head="int8")
    before, expected = shape_of(model), logits_of(model)
    with pytest.raises(LifecycleError, match=message) as caught:
        get_peft_model(model, lora(**fields))
    assert len(str(caught.value).splitlines()) == 2
    assert shape_of(model) == before
    assert torch.equal(logits_of(model), expected)
    # The model can be adapted still.
    assert train(get_peft_model(model, lora()))[-1] < 6


def test_an_int8_embedding_keeps_its_tokens(tmp_path: Path) -> None:
    tied = load(make_float_model("qwen2", tmp_path), head="int8")
    for wanted in ([5, 6], {"embed_tokens": [5, 6]}):
        with pytest.raises(LifecycleError, match=r"^trainable_token_indices: .*embed_tokens must"):
            get_peft_model(tied, lora(trainable_token_indices=wanted))
    with pytest.raises(LifecycleError, match=r"^modules_to_save: .*embed_tokens must .* int8 one"):
        get_peft_model(tied, lora(modules_to_save=["embed_tokens"]))


def test_float_tokens_heads_and_embeddings_train_beside_packed_layers(
    source: Path, tmp_path: Path
) -> None:
    choices: list[dict[str, Any]] = [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6]},
    ]
    for number, fields in enumerate(choices):
        model = get_peft_model(load(source), lora(**fields))
        losses = train(model)
        assert losses[-1] < losses[0]
        expected = logits_of(model)
        model.save_pretrained(tmp_path / str(number))
        again = PeftModel.from_pretrained(load(source), tmp_path / str(number))
        assert torch.equal(logits_of(again.eval()), expected)


def test_a_ternary_head_keeps_its_rows(source: Path) -> None:
    """Rows of a latent head that are trained apart would be multiplied with as float ones."""
    model = load(source, "train", head="ternary")
    with pytest.raises(LifecycleError, match="trainable_token_indices: lm_head .*a latent one"):
        get_peft_model(model, lora(trainable_token_indices={"lm_head": [5]}))


@pytest.mark.parametrize("mode", ["none", "all", "lora_only"])
@pytest.mark.parametrize("head", ["keep", "int8"])
def test_biases_train_where_lora_says_so(tmp_path: Path, head: str, mode: str) -> None:
    source = make_float_model("qwen2", tmp_path)
    model = get_peft_model(load(source, head=head), lora(bias=mode))
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    before = {name: bias.detach().clone() for name, bias in biases.items()}
    kept = {n: t.clone() for n, t in model.state_dict().items() if "qweight" in n}
    expected = {
        name
        for name in biases
        if mode == "all" or (mode == "lora_only" and "q_proj.base_layer" in name)
    }
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = {name for name, bias in biases.items() if not torch.equal(bias, before[name])}
    # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
    assert {n for n in moved if "k_proj" not in n} == {n for n in expected if "k_proj" not in n}
    assert all(torch.equal(model.state_dict()[name], one) for name, one in kept.items())
    logits = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(source, head=head), tmp_path / "adapter")
    assert torch.equal(logits_of(again.eval()), logits)


def test_lora_around_an_int8_head(source: Path, tmp_path: Path) -> None:
    base = load(source, head="int8")
    assert int8_modules(base)
    model = get_peft_model(base, lora(target_modules=["q_proj", "lm_head"]))
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(source, head="int8"), tmp_path)
    assert torch.equal(logits_of(again.eval()), expected)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(LifecycleError, match="merge: .* must have a float weight"):
            merge()
    with pytest.raises(LifecycleError, match="lm_head must have a float weight, got int8"):
        merge_and_requantize(model, verbose=False)
    assert torch.equal(logits_of(model), expected)


def test_lora_around_an_int8_embedding(tmp_path: Path) -> None:
    source = make_float_model("qwen2", tmp_path)
    config = lora(target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(load(source, head="int8"), config)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(source, head="int8"), tmp_path / "adapter")
    assert torch.equal(logits_of(again.eval()), expected)


@pytest.mark.parametrize("empty", [False, True])
def test_every_way_to_inject_is_guarded(source: Path, empty: bool) -> None:
    from peft import HRAConfig

    wanted = HRAConfig(target_modules=["v_proj"])
    for model in (load(source), load(source, "train")):
        before = shape_of(model)
        with pytest.raises(LifecycleError, match=r"^HRA: model.layers.0.self_attn.v_proj must"):
            inject_adapter_in_model(wanted, model, low_cpu_mem_usage=empty)
        assert shape_of(model) == before
        model.add_adapter(lora(), "first")
        second = lora(target_modules=["v_proj"], init_lora_weights="olora")
        with pytest.raises(LifecycleError, match=r"^LoRA: init_lora_weights .*v_proj"):
            model.add_adapter(second, "second")


def test_prompts_find_an_int8_embedding(source: Path) -> None:
    for start in (PromptTuningInit.RANDOM, PromptTuningInit.SAMPLE_VOCAB):
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=start
        )
        torch.manual_seed(0)
        model = get_peft_model(load(source, head="int8"), config)
        losses = train(model)
        assert losses[-1] < losses[0]
        assert not any("word_embeddings" in name for name in model.base_model.state_dict())


@pytest.mark.parametrize("first", ["bitlab_hf", "peft"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    second = {"bitlab_hf": "peft", "peft": "bitlab_hf"}[first]
    script = (
        f"import {first}, sys\n"
        f"print(first := 'peft' in sys.modules)\n"
        f"import {second}\n"
        "from peft.tuners.tuners_utils import BaseTuner\n"
        "assert BaseTuner._bitlab_guarded\n"
        "assert not any(type(one).__module__.startswith('bitlab_hf.peft')\n"
        "               and one.name == 'peft' for one in sys.meta_path)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first == 'peft'}\n"


def test_a_ternary_embedding_and_its_head(tmp_path: Path) -> None:
    packed = make_packed("qwen2", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(packed)
    before, expected = shape_of(base), logits_of(base)
    for fields, op in (
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ):
        message = rf"^{op}: .*embed_tokens must .* a deployed one\n.*model.dequantize\(\) first"
        with pytest.raises(LifecycleError, match=message):
            get_peft_model(base, lora(**fields))
        assert shape_of(base) == before
    for targets in (["q_proj", "lm_head"], ["q_proj", "embed_tokens"]):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(packed), lora(target_modules=targets)
        )
        losses = train(model)
        assert losses[-1] < losses[0]
        trained = logits_of(model)
        model.save_pretrained(tmp_path / targets[1])
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(packed), tmp_path / targets[1]
        )
        assert torch.equal(logits_of(again.eval()), trained)
        with pytest.raises(LifecycleError, match=r"merge: .* must have a float weight"):
            model.merge_and_unload()
        name = targets[1] if targets[1] == "lm_head" else "model.embed_tokens"
        wanted = "a weight of its own.*an embedding" if name == "lm_head" else "got ternary rows"
        with pytest.raises(LifecycleError, match=f"{name} must have .*{wanted}"):
            merge_and_requantize(model, verbose=False)
        assert torch.equal(logits_of(model), trained)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    losses = train(get_peft_model(base, prompts))
    assert losses[-1] < losses[0]
    assert torch.equal(logits_of(base), expected)
