"""Every class of transformers that keeps experts as tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bitlab_hf import BitLabConfig, quantized_layers
from bitlab_hf.model.experts import expert_modules
from bitlayers.experts import BitExperts
from tests.bitlab_hf.sweep.configs import small
from tests.bitlab_hf.sweep.experts import (
    COMMAND,
    NOT_BUILT,
    ROUTERS,
    build,
    classes,
    folder_of,
    inputs_of,
    looked_at,
    rows,
    used_experts,
    with_experts,
)
from tests.bitlab_hf.sweep.models import config_class, model_class

# What keeps its experts in a way of its own, and one that does not.
ALWAYS = [
    "dbrx",
    "diffusion_gemma",
    "inkling_text",
    "jetmoe",
    "llama4_text",
    "longcat_flash",
    "mixtral",
]


def test_all_classes_are_looked_at() -> None:
    known = {name for held in classes().values() for name in held}
    assert len(known) >= 70
    built = set()
    for architecture in with_experts():
        with torch.device("meta"):
            model = model_class(architecture)(small(config_class(architecture)))
        for module in model.modules():
            built.add(type(module).__name__)
    assert known - built == NOT_BUILT
    assert {kind for kind, _ in rows()} == known - NOT_BUILT


def check(architecture: str, folder: Path) -> None:
    for row in looked_at(architecture, folder):
        assert row.holds(), row.line()
        held = rows().get((row.kind, row.architecture))
        assert held == row.line(), f"the table is old: {COMMAND}"


@pytest.mark.parametrize("architecture", ALWAYS)
def test_each_kind(architecture: str, tmp_path: Path) -> None:
    check(architecture, tmp_path)


@pytest.mark.ci
@pytest.mark.parametrize("architecture", [name for name in with_experts() if name not in ALWAYS])
def test_architecture(architecture: str, tmp_path: Path) -> None:
    check(architecture, tmp_path)


@pytest.mark.parametrize("architecture", with_experts())
def test_latent_experts(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    kinds = set(classes()[folder_of(architecture)])
    floats = {n: module for n, module in model.named_modules() if type(module).__name__ in kinds}
    if not floats:
        # The part of such a model that sees or hears.
        assert architecture.endswith(("_vision", "_audio")), "nothing to look at"
        return
    model.save_pretrained(tmp_path)
    latent = type(model).from_pretrained(tmp_path, quantization_config=BitLabConfig())
    found = {name: one.module for one in expert_modules(latent) for name in one.names}
    assert found.keys() == floats.keys()
    converted = [name for layer in quantized_layers(latent) for name in layer.names]
    assert not list(filter(ROUTERS.search, converted))
    for name, module in found.items():
        _check_latent(name, module, floats[name], latent.get_submodule(name))
        _check_gradients(copy.deepcopy(module).train())


def _check_latent(name: str, module: BitExperts, held: nn.Module, owner: nn.Module) -> None:
    assert isinstance(module, type(held))
    assert owner is module
    state = module.state_dict()
    assert state.keys() == held.state_dict().keys()
    for leaf, tensor in held.state_dict().items():
        assert torch.equal(state[leaf], tensor), f"{name}.{leaf}"


def _check_gradients(module: BitExperts) -> None:
    inputs = inputs_of(module)
    module(*inputs).square().sum().backward()
    for name, stack in module.stacks.items():
        gradient = module._parameters[name].grad  # type: ignore[union-attr]
        assert gradient is not None
        reached = stack.apart(gradient).flatten(1).abs().sum(1) > 0
        assert reached.tolist() == used_experts(module, inputs), name
