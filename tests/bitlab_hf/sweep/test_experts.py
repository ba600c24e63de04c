"""Every class of transformers that keeps experts as tensors and says how they lie."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bitlab_hf import BitLabConfig, deploy, quantized_layers, save
from bitlab_hf.model.experts import UNDECORATED, expert_modules
from bitlayers.experts import BitExperts
from tests.bitlab_hf.sweep.configs import small
from tests.bitlab_hf.sweep.models import architectures, class_name, config_class, model_class
from tests.bitlab_hf.sweep.training import fill

MODELS = Path(transformers.__file__).parent / "models"
_DECORATED = re.compile(r"@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)\(")
# Built by no architecture alone: a talker that another model makes.
NOT_BUILT = {"Qwen3OmniMoeTalkerTextExperts"}
# An encoder's experts and a decoder's are one, which ternary ones cannot be yet.
TIED = {"diffusion_gemma"}
ROUTERS = re.compile(r"router|(^|\.)gate$|gate\.wg$|shared_expert_gate")


@cache
def decorated() -> dict[str, list[str]]:
    """Returns the classes, and those described beside them, by the folder of transformers that has
    them.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text()
        described = [name for name in UNDECORATED if f"class {name}(" in text]
        found[file.parent.name] = _DECORATED.findall(text) + described
    return {name: classes for name, classes in found.items() if classes}


def _folder(architecture: str) -> str:
    return Path(model_class(architecture).__module__.replace(".", "/")).parent.name


@cache
def with_experts() -> list[str]:
    """Returns the architectures whose models are of such a folder."""
    # No inputs are known for the second, which is no matter here.
    names = [*architectures(), "deepseek_ocr2"]
    return [name for name in names if class_name(name) and _folder(name) in decorated()]


def build(architecture: str) -> Any:
    torch.manual_seed(0)
    model = model_class(architecture)(small(config_class(architecture))).eval()
    fill(model)
    return model


def call(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return module(*inputs)  # type: ignore[no-any-return]


def test_all_classes_are_looked_at() -> None:
    known = {name for classes in decorated().values() for name in classes}
    assert len(known) >= 60
    built = set()
    for architecture in with_experts():
        for module in build(architecture).modules():
            built.add(type(module).__name__)
    assert known - built == NOT_BUILT


@pytest.mark.parametrize("architecture", with_experts())
def test_experts(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    classes = set(decorated()[_folder(architecture)])
    names = {n for n, module in model.named_modules() if type(module).__name__ in classes}
    floats = {name: model.get_submodule(name) for name in names}
    model.save_pretrained(tmp_path / "float")
    load = type(model).from_pretrained
    latent = load(tmp_path / "float", quantization_config=BitLabConfig())
    found = {one.names[0]: one.module for one in expert_modules(latent)}
    if architecture in TIED:
        assert not found
        return
    assert found.keys() == names
    if not names:
        # The part of such a model that sees or hears.
        assert architecture.endswith(("_vision", "_audio")), "nothing to look at"
        return
    converted = [name for layer in quantized_layers(latent) for name in layer.names]
    assert not list(filter(ROUTERS.search, converted))
    outputs, inputs = {}, {}
    for name, module in found.items():
        _check_latent(name, module, floats[name], latent.get_submodule(name))
        inputs[name] = _inputs(module)
        trained, evaluated = (call(module.train(mode), inputs[name]) for mode in (True, False))
        assert torch.equal(trained, evaluated), name
        assert bool(torch.isfinite(evaluated).all())
        outputs[name] = evaluated
        _check_gradients(module.train(), inputs[name])
    save(deploy(latent.eval()), tmp_path / "packed")
    packed = copy.deepcopy(latent)
    at_load = load(tmp_path / "float", quantization_config=BitLabConfig(mode="infer"))
    for loaded in (packed, load(tmp_path / "packed"), at_load):
        again = {one.names[0]: one.module for one in expert_modules(loaded)}
        assert again.keys() == names
        for name, module in again.items():
            assert module.is_deployed
            assert torch.equal(call(module, inputs[name]), outputs[name]), name


def _check_latent(name: str, module: BitExperts, held: nn.Module, owner: nn.Module) -> None:
    assert isinstance(module, type(held))
    assert owner is module
    state = module.state_dict()
    assert state.keys() == held.state_dict().keys()
    for leaf, tensor in held.state_dict().items():
        assert torch.equal(state[leaf], tensor), f"{name}.{leaf}"


def _inputs(module: BitExperts) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    width = next(iter(module.stacks.values())).in_features
    x = torch.randn(11, width, generator=generator)
    # The last expert gets no token.
    index = torch.randint(0, module.num_experts - 1, (11, 2), generator=generator)
    return x, index, torch.rand(11, 2, generator=generator)


def _check_gradients(module: BitExperts, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    module(*inputs).square().sum().backward()
    for name in module.stacks:
        gradient = module._parameters[name].grad  # type: ignore[union-attr]
        assert gradient is not None
        reached = gradient.flatten(1).abs().sum(1) > 0
        used = [expert in inputs[1] for expert in range(module.num_experts)]
        assert reached.tolist() == used, name
    module.zero_grad()
