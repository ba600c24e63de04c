"""Every method of the installed PEFT around ternary layers: it trains rightly, or it is refused.

Rightly: the gradients are those of a float model that rounds weights and activations as the ternary
one does, and a saved adapter gives the same bits when it is loaded again.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bitcore.errors import LifecycleError
from bitcore.reference import pack_weight, quantize_activation, unpack_weight
from bitlab_hf import BitLabConfig, quantized_layers
from tests.bitlab_hf.models import make_float_model, token_ids

TARGETS = ["q_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 20, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "BOFT": {"boft_block_size": 16},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {
        "cpt_token_ids": [1, 2, 3, 4],
        "cpt_mask": [1] * 4,
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 1},
    "OFT": {"oft_block_size": 16},
    "OSF": {"effective_rank": 8},
    "POLY": {"n_tasks": 1, "r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 16, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
# Those that multiply with the float weight: around a deployed layer, and around a latent one.
REFUSED = {
    "infer": {
        "ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HIRA", "HRA", "OSF", "PEANUT", "PSOFT",
        "SHIRA", "SUPERTUNING", "TINYLORA",
    },
    "train": {"FROD", "GLORA", "HRA", "SHIRA", "SUPERTUNING"},
}  # fmt: skip
# Where an environment lacks what a method needs.
LACKING = set() if importlib.util.find_spec("sklearn") else {"ADAMSS"}
# They draw numbers in each forward pass.
RANDOM = {"PVERA", "SHADOW"}


class Rounded(nn.Linear):
    """A float layer that computes what a ternary one does, in plain torch."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.no_grad():
            qweight, scale, _ = pack_weight(self.weight, "per_tensor", 0)
            weight = unpack_weight(qweight, scale, self.out_features, torch.float32)
            codes, scale = quantize_activation(input, False)
            weight, x = weight - self.weight, codes.float() * scale - input
        return F.linear(input + x, self.weight + weight, self.bias)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model(
        "llama", tmp_path_factory.mktemp("float"), use_cache=False, attention_bias=True
    )


def load(path: Path, mode: str, **fields: Any) -> Any:
    config = BitLabConfig(mode=mode, **fields)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def rounded(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            module.__class__ = Rounded
    return model


def settings(kind: PeftType, folder: Path, **changes: Any) -> Any:
    given = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    given |= SETTINGS.get(kind.value, {}) | changes
    if kind is PeftType.XLORA:
        given |= {"adapters": {"0": str(folder)}, "hidden_size": 64}
    known = inspect.signature(CONFIGS[kind]).parameters
    return CONFIGS[kind](**{name: value for name, value in given.items() if name in known})


@pytest.fixture(scope="module")
def adapter(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter, for the method that mixes several."""
    folder = tmp_path_factory.mktemp("adapter")
    config = settings(PeftType.LORA, folder)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(folder)
    return folder


def inputs(kind: PeftType) -> dict[str, Tensor]:
    ids = token_ids()
    given = {"input_ids": ids, "labels": ids}
    if kind in (PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING):
        given["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
    if kind is PeftType.CPT:
        given["input_type_mask"] = torch.full_like(ids, 4)
    return given


@torch.no_grad()
def logits(model: Any, kind: PeftType) -> Tensor:
    given = inputs(kind)
    found: Tensor = model(**{name: one for name, one in given.items() if name != "labels"}).logits
    return found


def adapted(base: Any, config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, copy.deepcopy(config))


def gradients(model: Any, kind: PeftType) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    model(**inputs(kind)).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found
    assert None not in found.values(), [name for name, one in found.items() if one is None]
    return found


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.value)
def test_every_method_trains_rightly_or_is_refused(
    kind: PeftType, mode: str, source: Path, adapter: Path, tmp_path: Path
) -> None:
    if kind.value in LACKING:
        with pytest.raises(ImportError):
            settings(kind, adapter)
        return
    config = settings(kind, adapter)
    base = load(source, mode)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    packed = quantized_layers(base)[0].module.packed_tensors()
    leaves = tuple(packed) if mode == "infer" else ("weight",)
    layers = [getattr(f.module, leaf).clone() for f in quantized_layers(base) for leaf in leaves]
    tree = [(name, type(module)) for name, module in base.named_modules()]
    if kind.value in REFUSED[mode]:
        state = "a deployed one" if mode == "infer" else "a latent one"
        with pytest.raises(LifecycleError, match=rf"^{kind.value}: .*_proj must .*got {state}\n"):
            adapted(base, config)
        # Nothing was changed by it.
        assert tree == [(name, type(module)) for name, module in base.named_modules()]
        after = base.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return
    model, reference = adapted(base, config), adapted(rounded(source), config)
    # A step away from where they start, which for many is zero, and both from the same place.
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
                parameters[name].copy_(parameter)
    if kind.value not in RANDOM and kind is not PeftType.XLORA:
        expected, got = gradients(reference.eval(), kind), gradients(model.eval(), kind)
        assert expected.keys() == got.keys()
        for name, one in expected.items():
            # A rounding here moves an activation's code there.
            error = float((got[name] - one).norm() / one.norm().clamp(min=1e-3))
            assert error < 0.05, f"{name}: {error}"
    check_training(model.train(), kind)
    model.eval()
    expected_logits = logits(model, kind)
    assert torch.isfinite(expected_logits).all()
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(load(source, mode), tmp_path).eval()
    assert torch.equal(logits(again, kind), expected_logits)
    # The layers are in the order they had, and as they were.
    held = [getattr(f.module, leaf) for f in quantized_layers(model) for leaf in leaves]
    assert len(held) == len(layers)
    assert all(map(torch.equal, held, layers))


def check_training(model: Any, kind: PeftType) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = [parameter.detach().clone() for parameter in trained]
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs(kind)).loss.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
