"""Deployment of a whole model: full-precision weights out, packed ones in, for good."""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from bitcore.errors import LifecycleError
from bitlab_hf.config import QUANT_METHOD, BitLabConfig
from bitlab_hf.model.embedding import ternary_embeddings
from bitlab_hf.model.experts import expert_modules, find_experts, owners_of
from bitlab_hf.model.int8 import (
    LAYERS_ATTRIBUTE,
    commit_int8,
    int8_layers,
    int8_modules,
    plan_int8,
)
from bitlab_hf.model.marks import mark_quantized, retie_packed
from bitlab_hf.model.replace import check_single_weight
from bitlab_hf.model.tree import Found, find_modules, quantized_layers
from bitlab_hf.model.vocabulary import guard_vocabulary
from bitlayers.base import BitLayerBase
from bitlayers.checks import check_deployable
from bitlayers.deployment import Deployment
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.quantized import QuantizedModule
from bitlayers.registry import LAYER_REGISTRY
from bitlayers.rmsnorm import RMSNormBitLinear

logger = logging.getLogger("bitlab")
Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model) -> Model:
    """Packs every quantized layer of a model, and all ternary experts, for good, or none.

    First every layer is checked and packed beside the weights, then all are committed, so an error
    leaves the model as it was. With ``head="int8"`` the output head, and the embedding tied to it,
    are quantized with them, and so are the layers of ``int8_layers``. Other tensors keep their
    dtype. Gradients and an optimizer that still hold the latent weights keep their memory: drop
    them first.

    Args:
        model: A model with latent quantized layers, from ``from_pretrained`` or `replace_linear`.

    Returns:
        The model, changed in place and in eval mode.

    Raises:
        LifecycleError: The model has no latent layers, is deployed already, sharded, or wrapped by
            an adapter or a data-parallel module.
        NonFiniteError: A weight holds NaN or infinity; the message names it.
        ArgumentError: An estimator gave scales that no file may have; the message names the layer.
        ConfigError: Int8 is asked of a head, or of a layer, that has no int8 form.
    """
    _check_unwrapped(model)
    # torch.compile wraps the module that is meant.
    inner: nn.Module = getattr(model, "_orig_mod", model)
    layers, experts = quantized_layers(inner), expert_modules(inner)
    modules = [*(one.module for one in layers), *(one.module for one in experts)]
    if not modules:
        raise LifecycleError(
            "deploy: model must hold quantized layers, got none\n"
            "Load it with quantization_config=BitLabConfig(), or call replace_linear(model)."
        )
    if all(one.is_deployed for one in modules):
        raise LifecycleError("deploy: model must be latent, got one that is deployed already")
    latent = [layer for layer in layers if not layer.module.is_deployed]
    for layer in latent:
        check_deployable(layer.module, f"{layer.names[0]}.weight")
    experts = [one for one in experts if not one.module.is_deployed]
    for one in experts:
        one.module.check_deployable(one.names[0])
    if any(p.grad is not None for module in modules for p in module.parameters()):
        logger.warning(
            "bitlab: deploy() found gradients; an optimizer that is still alive keeps the latent "
            "weights in memory"
        )
    groups = check_single_weight(latent)
    int8 = plan_int8(inner)
    built = [_build(group) for group in groups.values()]
    owners = owners_of(experts)
    names = {one.module: one.names[0] for one in experts}
    packed = {id(one): one.build_deployment(names[one]) for one in owners.values()}
    for group, deployments in zip(groups.values(), built, strict=True):
        for layer, deployment in zip(group, deployments, strict=True):
            layer.module.commit(deployment)
            if isinstance(deployment, tuple):
                # One Parameter for all: counted, moved and saved once.
                layer.module.qweight = group[0].module.qweight
    for one in experts:
        owner = owners[one.module]
        for name in owner.stacks:
            if owner is one.module:
                owner.commit(name, *packed[id(owner)].pop(name))
            else:
                one.module.share(name, owner)
    model.eval()
    if isinstance(inner, PreTrainedModel):
        commit_int8(inner, int8)
        _attach(inner)
    return model


def _build(group: list[Found[BitLayerBase]]) -> list[Deployment]:
    """Packs layers that share a weight, once for all of them unless they pack themselves."""
    first = group[0].module.build_deployment(group[0].names[0])
    if isinstance(first, tuple):
        return [first] * len(group)
    return [first, *(layer.module.build_deployment(layer.names[0]) for layer in group[1:])]


def _check_unwrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise LifecycleError(f"deploy: model must be a torch module, got {type(model).__name__}")
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if wrapped or hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise LifecycleError(
            f"deploy: model must have no adapters around its layers, got some{_at(wrapped)}\n"
            "Merge or unload them first, then deploy the model that was inside."
        )
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, parallel) or type(model).__name__ == "FullyShardedDataParallel":
        raise LifecycleError(
            f"deploy: model must be the module itself, got {type(model).__name__}\n"
            "Pass model.module (accelerator.unwrap_model(model)), gathered in one process."
        )


def _at(names: list[str]) -> str:
    return f" (at {names[0]} and {len(names) - 1} more)" if names else ""


def _attach(model: PreTrainedModel) -> None:
    """Makes transformers see a quantized model: quantizer, configuration, tied names."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitLabConfig):
        config = described(model)
    config = copy.deepcopy(config)
    settle_vocabulary(model, config)
    layers = int8_layers(model)
    config.int8_layers = sorted(name for found in layers for name in found.names)
    if config.head == "int8" and len(int8_modules(model)) == len(layers):
        # A model without a head, of a file that has one.
        config.head = "keep"
    config.weight_format, config.mode = "packed", "auto"
    # By name, as transformers finds it: the quantizer stands above this module.
    quantizer = AUTO_QUANTIZER_MAPPING[QUANT_METHOD](config, pre_quantized=True)
    model.config.quantization_config = quantizer.quantization_config
    mark_quantized(model, quantizer)
    retie_packed(model, set())
    guard_vocabulary(model)


def settle_vocabulary(model: PreTrainedModel, config: BitLabConfig) -> None:
    """Makes configurations say what the output head and the embedding are, and whether they are
    tied, once they are packed or somebody put in others.
    """
    if config.embedding == "ternary" and not ternary_embeddings(model):
        config.embedding = "keep"
    head = model.get_output_embeddings()
    packed = head is not None and head._parameters.get("qweight") is not None
    if isinstance(head, QuantizedModule) and packed and not _borrows(model, head):
        # The head has quantized weights of its own; the embedding has other ones, or float ones.
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    if config.head == "ternary" and head is not None and not isinstance(head, BitLayerBase):
        config.head = "keep"
        names = [name for name, module in model.named_modules() if module is head]
        config.modules_to_not_convert = sorted({*(config.modules_to_not_convert or []), *names})


def _borrows(model: PreTrainedModel, head: QuantizedModule) -> bool:
    """Tells whether a head shares its weight with an embedding, the encoder's or the decoder's.

    By name, too, as a file is written: offloaded weights are put in anew after every forward pass,
    each as a Parameter of its own.
    """
    embeddings = find_modules(model, QuantizedEmbedding)
    if any(found.module.qweight is head.qweight for found in embeddings):
        return True
    tied = model.all_tied_weights_keys or {}
    modules = [one for one in find_modules(model, QuantizedModule) if one.module is head]
    own, others = (
        {tied.get(key, key) for one in some for name in one.names for key in [f"{name}.qweight"]}
        for some in (modules, embeddings)
    )
    return not own.isdisjoint(others)


def described(model: PreTrainedModel) -> BitLabConfig:
    """Returns the configuration of a model that `replace_linear` converted without writing one."""
    layers = quantized_layers(model)
    names = {name for layer in layers for name in layer.names}
    classes = {type(layer.module) for layer in layers}
    registered = [name for name, known in LAYER_REGISTRY.items() if known in classes]
    config = BitLabConfig(
        layer=registered[0] if registered else "BitLinear",
        overrides={
            name: layer.module.quant_config.to_dict() for layer in layers for name in layer.names
        },
    )
    experts = expert_modules(model)
    if experts:
        config.experts = "ternary"
    config.overrides |= {
        f"{name}.{leaf}": stack.config.to_dict()
        for one in experts
        for leaf, stack in one.module.stacks.items()
        for name in one.names
    }
    if config.layer == "BitLinear":
        config.sub_norm = [
            name
            for layer in layers
            for name in layer.names
            if isinstance(layer.module, RMSNormBitLinear)
        ]
    int8 = int8_layers(model)
    config.head = "int8" if len(int8_modules(model)) > len(int8) else "keep"
    # Of a latent model they are float still.
    config.int8_layers = sorted(
        {name for found in int8 for name in found.names} | set(getattr(model, LAYERS_ATTRIBUTE, []))
    )
    if isinstance(model.get_output_embeddings(), BitLayerBase):
        config.head = "ternary"
    config.modules_to_not_convert = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in names.union(config.int8_layers)
    )
    if experts:
        # Those beside them that stay float.
        config.modules_to_not_convert += [
            name for one in find_experts(model, []) for name in one.names
        ]
    return config
