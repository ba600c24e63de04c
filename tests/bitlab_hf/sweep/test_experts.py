"""Every class of transformers that keeps experts as tensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bitcore.errors import ConfigError
from bitlab_hf import BitLabConfig, deploy, quantized_layers, save
from bitlab_hf.model.experts import expert_modules
from bitlayers import set_quant_strength
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
        holder = model.get_submodule(name.rpartition(".")[0])
        # dbrx: the module that holds the experts runs them.
        runs = holder if type(holder).__name__ == "DbrxExperts" else floats[name]
        _check_arithmetic(copy.deepcopy(module).train(), runs.train())


def _check_latent(name: str, module: BitExperts, held: nn.Module, owner: nn.Module) -> None:
    assert isinstance(module, type(held))
    assert owner is module
    state = module.state_dict()
    assert state.keys() == held.state_dict().keys()
    for leaf, tensor in held.state_dict().items():
        assert torch.equal(state[leaf], tensor), f"{name}.{leaf}"


@torch.no_grad()
def _check_arithmetic(module: BitExperts, floats: nn.Module) -> None:
    """With nothing quantized they compute what transformers' own class computes."""
    set_quant_strength(module, 0.0)
    inputs = inputs_of(module)
    outputs = module(*inputs)
    torch.testing.assert_close(outputs, floats(*inputs).view_as(outputs))


def _check_gradients(module: BitExperts) -> None:
    inputs = inputs_of(module)
    module(*inputs).square().sum().backward()
    for name, stack in module.stacks.items():
        gradient = module._parameters[name].grad  # type: ignore[union-attr]
        assert gradient is not None
        reached = stack.apart(gradient).flatten(1).abs().sum(1) > 0
        assert reached.tolist() == used_experts(module, inputs), name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("dbrx", "ffn_config.moe_top_k"),
        ("ernie4_5_moe", "moe_k"),
        ("gemma4_text", "top_k_experts"),
        ("hunyuan_v1_moe", "moe_topk"),
        ("mixtral", "num_experts_per_tok"),
    ],
)
def test_more_experts_a_token_than_there_are(architecture: str, name: str, tmp_path: Path) -> None:
    """Latent, packed at load and from a packed file, before a weight is read."""
    model = build(architecture)
    model.save_pretrained(tmp_path / "float")
    load, latent = type(model).from_pretrained, BitLabConfig()
    save(deploy(load(tmp_path / "float", quantization_config=latent)), tmp_path / "packed")
    for folder in ("float", "packed"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        *outer, leaf = name.split(".")
        held = config[outer[0]] if outer else config
        held[leaf] = [9] if isinstance(held[leaf], list) else 9
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    for folder, config in (
        ("float", latent), ("float", BitLabConfig(mode="infer")), ("packed", None),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{leaf} must be at most the number of experts, 4"):
            load(tmp_path / folder, quantization_config=config)
