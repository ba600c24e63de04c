"""BitLabHfQuantizer: what transformers calls, and when.

Three ways to load, told apart by what the file holds and by `BitLabConfig.mode`:

- latent: the skeleton's linear layers are swapped, then everything loads as in a float model;
- packed at load: the same skeleton, and each weight is packed as it arrives from a float file;
- packed: the skeleton holds the packed tensors' shapes, and the file is memory-mapped into it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bitcore.errors import ConfigError, LifecycleError
from bitlab_hf.checkpoint.headers import Checkpoint, read_checkpoint
from bitlab_hf.checkpoint.loading import Loading
from bitlab_hf.checkpoint.packed_state import packed_state
from bitlab_hf.checkpoint.plan import Source, make_plan
from bitlab_hf.checkpoint.rotated import check_not_rotated
from bitlab_hf.config import LOADING_ATTRIBUTES, QUANT_METHOD, BitLabConfig
from bitlab_hf.model.by_expert import by_expert
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.embedding import restore_embeddings, ternary_embeddings
from bitlab_hf.model.expert_forms import give_back
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.int8 import int8_modules, restore_float
from bitlab_hf.model.marks import mark_latent, mark_quantized, unmark
from bitlab_hf.model.parallel import finish_parallel, plan_experts, plan_parallel
from bitlab_hf.model.parts import check_whole, save_tied_once
from bitlab_hf.model.tree import Found, quantized_layers, set_module, take_hooks
from bitlayers.base import BitLayerBase
from bitlayers.registry import get_layer


class BitLabHfQuantizer(HfQuantizer):
    """transformers' view of a BitLab model.

    Args:
        quantization_config: Copied, so that one object can serve several models.
        pre_quantized: Whether the configuration came from the checkpoint.

    Raises:
        LifecycleError: A deployed file is loaded with ``mode="train"``.
        ArgumentError: The configuration's layer is not registered.
    """

    quantization_config: BitLabConfig

    def __init__(self, quantization_config: BitLabConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        config = self.quantization_config
        get_layer(config.layer)
        self.was_converted = self.pre_quantized
        self.file_is_packed = self.was_converted and config.weight_format == "packed"
        if self.file_is_packed and config.mode == "train":
            raise LifecycleError(
                "bitlab: mode must be 'auto' or 'infer' for a deployed checkpoint, got 'train'\n"
                "It has no latent weights: train the latent checkpoint, or adapters on this one."
            )
        # transformers must treat a file of latent weights like any float file.
        self.pre_quantized = self.file_is_packed
        self.build_packed = self.file_is_packed or config.mode == "infer"
        config.weight_format = "packed" if self.build_packed else "latent"
        self.own_names = False
        self.loading: Loading | None = None

    # Before the weights.

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        held = model.config.to_dict()
        # What is BitLab's own names modules, by patterns that can be anything.
        held.pop("quantization_config", None)
        check_not_rotated("bitlab", held)
        checkpoint = self._read_checkpoint(model, checkpoint_files)
        self.own_names = checkpoint is not None and checkpoint.own_names
        source = Source(self.was_converted, self.file_is_packed, self.build_packed)
        plan = make_plan(model, self.quantization_config, checkpoint, source)
        self.loading = Loading(plan)
        self.loading.swap(model, dtype)
        self._check_offload(device_map)

    def _read_checkpoint(
        self, model: PreTrainedModel, files: list[str] | None
    ) -> Checkpoint | None:
        return read_checkpoint(model, files, self)

    def _check_offload(self, device_map: Any) -> None:
        packs = self.build_packed and not self.file_is_packed
        if packs and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "bitlab: device_map must not offload to disk while packing at load, got 'disk'\n"
                "Deploy and save the model once, then load that checkpoint with any device_map."
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns how a file's tensors become the model's: not at all where they have its names."""
        if self.own_names:
            return []
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        packs = self.build_packed and not self.file_is_packed
        return by_expert(conversions) if packs else conversions

    # While the weights arrive.

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Tells whether a parameter is a float weight to be packed or quantized at load."""
        if not self.build_packed or self.file_is_packed or self.loading is None:
            return False
        return self.loading.packing.takes(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        assert self.loading is not None
        return self.loading.packing

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Returns the bytes of an element of a parameter once it is loaded."""
        if self.loading is not None and self.loading.packing.is_int8(param_name):
            # Not packed four to a byte, as the layers are.
            return 1
        if self.param_needs_quantization(model, param_name):
            return bits_per_weight(model.get_submodule(param_name.rpartition(".")[0])) / 8
        size: float = super().param_element_size(model, param_name, param)
        return size

    # After the weights.

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # It holds modules, which are the model's alone from here on.
        loading, self.loading = self.loading, None
        assert loading is not None
        loading.finish(model)
        finish_parallel(model)
        save_tied_once(model)
        if not self.build_packed:
            mark_latent(model)
            return
        self._check_offload(getattr(model, "hf_device_map", None))
        for name in LOADING_ATTRIBUTES:
            setattr(self.quantization_config, name, getattr(_DEFAULTS, name))
        mark_quantized(model, self)

    # Saving, training, undoing.

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Returns the packed state dict with its sentinel, and the names of the packed layers."""
        if not self.build_packed:
            return None, {}
        return packed_state(model)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Puts ``nn.Linear`` layers and float experts back, with exactly codes times scale (rounded
        to dtype).
        """
        if isinstance(dtype, str):
            # As transformers leaves it in a configuration that was saved.
            dtype = getattr(torch, dtype)
        check_whole("dequantize", model)
        for found in quantized_layers(model):
            _check_dequantizable(found)
        for embedding in ternary_embeddings(model):
            _check_data(embedding.names[0], embedding.module.qweight)
        for rows in int8_modules(model):
            _check_data(rows.names[0], rows.module.qweight)
        for one in expert_modules(model):
            _check_data(one.names[0], next(one.module.parameters(recurse=False)))
        weights: dict[int, nn.Parameter] = {}
        for found in quantized_layers(model):
            layer = found.module
            linear = nn.Linear(
                layer.in_features, layer.out_features, bias=layer.use_bias, device="meta"
            )
            qweight = layer.packed()[0]
            if id(qweight) not in weights:
                weights[id(qweight)] = nn.Parameter(layer.dequantized_weight(dtype))
            linear.weight = weights[id(qweight)]
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().to(linear.weight.dtype))
            take_hooks(layer, linear.train(layer.training))
            for name in found.names:
                set_module(model, name, linear)
        experts = [one.module for one in expert_modules(model)]
        shared = [id(next(one.parameters(recurse=False))) for one in experts]
        floats: dict[int, nn.Module] = {}
        for held, ternary in zip(shared, experts, strict=True):
            made = ternary.to_float(dtype)
            # What shared its weights shares them still.
            made._parameters.update(floats.setdefault(held, made)._parameters)
            give_back(model, made)
        restore_embeddings(model, dtype, weights)
        restore_float(model, dtype)
        # A float model is saved as transformers saves it.
        unmark(model)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Makes a plan for tensor or expert parallel one of BitLab's styles."""
        if plan is model.ep_plan:
            plan_experts(model, plan, self.build_packed)
            return
        assert self.loading is not None
        int8 = {name for rows in self.loading.plan.int8 for name in rows.names}
        layers = self.quantization_config.int8_layers
        plan_parallel(model, plan, self.build_packed, int8, layers)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return not self.build_packed

    @property
    def is_compileable(self) -> bool:
        return True


def _check_dequantizable(found: Found[BitLayerBase]) -> None:
    """Checks that a layer is a linear layer of codes times scale, and that its weight is there."""
    layer, name = found.module, found.names[0]
    problem = None
    if getattr(layer, "rms_norm", None) is not None:
        problem = "must be a linear layer alone, got one behind a norm"
    elif layer.packs_itself:
        problem = "must hold packed ternary weights, got a layer that did its own packing"
    if problem is not None:
        raise LifecycleError(f"dequantize: {name} {problem}; nothing changed")
    if layer.is_deployed:
        _check_data(name, layer.qweight)


def _check_data(name: str, qweight: Tensor) -> None:
    if qweight.is_meta:
        raise LifecycleError(
            f"dequantize: {name} must hold data, got a weight on the meta device or offloaded; "
            "nothing changed"
        )


_DEFAULTS = BitLabConfig()


def register() -> None:
    """Registers BitLab with transformers; calling it again changes nothing."""
    from transformers.quantizers import auto

    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is BitLabConfig:
        return
    # bitlab_autoload's placeholder may hold the place.
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(BitLabConfig)
    register_quantizer(QUANT_METHOD)(BitLabHfQuantizer)
    # Only classes in this tuple may say something at load about a file that has a configuration.
    types: tuple[Any, ...] = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, BitLabConfig)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = types
