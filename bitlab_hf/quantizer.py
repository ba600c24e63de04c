"""BitLabHfQuantizer: the only file that knows transformers' hooks.

Three ways to load, told apart by what the file holds and by `BitLabConfig.mode`:

- latent: the skeleton's linear layers are swapped, then everything loads as in a float model;
- packed at load: the same skeleton, and each weight is packed as it arrives from a float file;
- packed: the skeleton holds the packed tensors' shapes, and the file is memory-mapped into it.
"""

from __future__ import annotations

import copy
import json
import re
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

from bitcore.errors import CheckpointError, ConfigError, LifecycleError, NonFiniteError
from bitlab_hf.checkpoint import (
    LAYERS_KEY,
    Checkpoint,
    check_packed_headers,
    read_checkpoint,
    split_by_presence,
    verify_packed,
    with_tied,
)
from bitlab_hf.config import LOADING_ATTRIBUTES, QUANT_METHOD, BitLabConfig
from bitlab_hf.deploy import untie_packed
from bitlab_hf.replace import (
    find_linears,
    quantized_layers,
    set_module,
    swap_latent,
    swap_packed,
)
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
        # Weights with NaN or infinity met while packing at load.
        self.nonfinite: list[str] = []
        # Every name of a weight to pack, by each of its names.
        self.weight_names: dict[str, set[str]] = {}
        self._aliases: dict[str, str] = {}

    # Before the weights.

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        checkpoint = read_checkpoint(model, checkpoint_files, self)
        skip = self._skipped(model)
        found = find_linears(model, skip)
        if checkpoint is not None:
            found, lacking = split_by_presence(
                found, with_tied(checkpoint, model, self.file_is_packed), self.file_is_packed,
                self.was_converted,
            )  # fmt: skip
            skip += [name for layer in lacking for name in layer.names]
        config.modules_to_not_convert = sorted(set(skip))
        if self.build_packed and not self.file_is_packed:
            self._check_offload(device_map)
        if not self.file_is_packed:
            swap_latent(model, found, config)
            if self.build_packed:
                self._prepare_packing(model, dtype, checkpoint)
            return
        swap_packed(model, found, config)
        self._alias_tied(model)
        if checkpoint is not None:
            check_packed_headers(quantized_layers(model), checkpoint, set(self._aliases))
            _ignore(model, "unexpected", checkpoint.sentinels())

    def _skipped(self, model: PreTrainedModel) -> list[str]:
        """Returns the patterns of modules to leave alone: defaults, the user's, the output head."""
        config = self.quantization_config
        names = self.get_modules_to_not_convert(
            model,
            config.modules_to_not_convert,
            sorted(model._keep_in_fp32_modules or ()),
            # A file of ours holds the resolved list, and what was converted despite the defaults.
            add_default_skips=not self.was_converted,
        )
        names = [name.removesuffix(".weight").removesuffix(".bias") for name in names]
        if config.head == "ternary":
            head = model.get_output_embeddings()
            own = {name for name, module in model.named_modules() if module is head}
            names = [name for name in names if name not in own]
        return sorted(set(names))

    def _check_offload(self, device_map: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "bitlab: device_map must not offload to disk while packing at load, got 'disk'\n"
                "Deploy and save the model once, then load that checkpoint with any device_map."
            )

    def _prepare_packing(
        self, model: PreTrainedModel, dtype: torch.dtype | None, checkpoint: Checkpoint | None
    ) -> None:
        """Packs from the file's own values, and packs weights that layers share once."""
        keep = set(model._keep_in_fp32_modules_strict or ())
        for found in quantized_layers(model):
            names = {f"{name}.weight" for name in found.names}
            self.weight_names.update(dict.fromkeys(names, names))
            for name in found.names:
                header = checkpoint.tensors.get(f"{name}.weight") if checkpoint else None
                # transformers would round a float32 file to the model's dtype before packing.
                if header is not None and header.dtype == "F32" and dtype != torch.float32:
                    keep.add(f"{name}.weight")
        model._keep_in_fp32_modules_strict = keep
        self._alias_tied(model)

    def _alias_tied(self, model: PreTrainedModel) -> None:
        """Takes the tied weights of converted layers out of transformers' hands.

        The target's tensors are the source's; transformers' own tying expects float weights.
        """
        names = {name for layer in quantized_layers(model) for name in layer.names}
        leaf = "qweight" if self.file_is_packed else "weight"
        for target, source in list(model.all_tied_weights_keys.items()):
            first, second = target.removesuffix(".weight"), source.removesuffix(".weight")
            if first in names and second in names:
                self._aliases[first] = second
            elif first in names or second in names:
                if self.file_is_packed:
                    raise CheckpointError(
                        f"{target}: tied weights must be packed together or not at all, got a "
                        "configuration that packs one of them\n"
                        "Set tie_word_embeddings to false in config.json."
                    )
                raise ConfigError(
                    f"bitlab: {target} must not be tied to be packed at load, got one tied to "
                    f"{source}\n"
                    'Load it latent with head="ternary", then call deploy(model).'
                )
        for target in self._aliases:
            model.all_tied_weights_keys.pop(f"{target}.weight")
        _ignore(model, "missing", [f"{target}.{leaf}" for target in self._aliases])

    # While the weights arrive.

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Tells whether a parameter is a latent weight to be packed at load."""
        if not self.build_packed or self.file_is_packed:
            return False
        module_name, _, leaf = param_name.rpartition(".")
        if leaf != "weight":
            return False
        module = model.get_submodule(module_name)
        return isinstance(module, BitLayerBase) and not module.is_deployed

    def get_quantize_ops(self) -> ConversionOps:
        return PackAtLoad(self)

    @property
    def quantized_element_size(self) -> float | None:
        return 0.25

    # After the weights.

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.build_packed:
            _mark_latent(model)
            return
        if self.nonfinite:
            raise NonFiniteError(
                f"{self.nonfinite[0]} must be finite to be packed, got NaN or infinity"
                + (f" (and {len(self.nonfinite) - 1} more)" if len(self.nonfinite) > 1 else "")
            )
        self._share_aliased(model)
        layers = quantized_layers(model)
        for found in layers:
            layer = found.module
            if not layer.is_deployed:
                raise CheckpointError(
                    f"{found.names[0]}.weight must be in the checkpoint to be packed, got none"
                )
            layer.qweight.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
        if self.file_is_packed and self.quantization_config.verify:
            verify_packed(layers)
        untie_packed(model)
        for name in LOADING_ATTRIBUTES:
            setattr(self.quantization_config, name, getattr(_DEFAULTS, name))
        mark_quantized(model, self)

    def _share_aliased(self, model: PreTrainedModel) -> None:
        for target, source in self._aliases.items():
            layers: Any = [model.get_submodule(name) for name in (target, source)]
            if not self.file_is_packed:
                # Whichever the file named was packed when it came.
                layers.sort(key=lambda layer: layer.is_deployed)
                if not layers[0].is_deployed:
                    layers[0].commit_packed(layers[1].qweight, layers[1].qweight_scale)
            layers[0].qweight = layers[1].qweight

    # Saving, training, undoing.

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Returns the packed state dict with its sentinel, and the names of the packed layers."""
        if not self.build_packed:
            return None, {}
        layers = quantized_layers(model)
        state = dict(model.state_dict())
        seen: dict[int, str] = {}
        for found in layers:
            # One module under two names, or one qweight in two layers, is stored once.
            for alias in found.names[1:]:
                for leaf in ("qweight", "qweight_scale", "bias"):
                    state.pop(f"{alias}.{leaf}", None)
            name, layer = found.names[0], found.module
            if id(layer.qweight) in seen:
                del state[f"{name}.qweight"]
            seen[id(layer.qweight)] = name
            state[f"{name}.qweight_scale"] = state[f"{name}.qweight_scale"].clone()
        state[f"{layers[0].names[0]}.weight"] = torch.empty(0, dtype=torch.uint8)
        return state, {LAYERS_KEY: json.dumps([found.names[0] for found in layers])}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Puts ``nn.Linear`` layers back, with exactly codes times scale (rounded to dtype)."""
        weights: dict[int, nn.Parameter] = {}
        for found in quantized_layers(model):
            layer = found.module
            linear = nn.Linear(
                layer.in_features, layer.out_features, bias=layer.use_bias, device="meta"
            )
            qweight, _ = layer.packed()
            if id(qweight) not in weights:
                weights[id(qweight)] = nn.Parameter(layer.dequantized_weight(dtype))
            linear.weight = weights[id(qweight)]
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().to(linear.weight.dtype))
            linear.train(layer.training)
            for name in found.names:
                set_module(model, name, linear)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Clears the plan: sharded rows of packed weights would be silently wrong."""
        plan.clear()

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


_DEFAULTS = BitLabConfig()


class PackAtLoad(ConversionOps):
    """Packs a weight as it arrives from a float file."""

    def __init__(self, quantizer: BitLabHfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Packs each tensor into its module; nothing is left for transformers to set."""
        model: PreTrainedModel = kwargs["model"]
        missing_keys: set[str] | None = kwargs.get("missing_keys")
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, BitLayerBase)
            expected = (layer.out_features, layer.in_features)
            if tuple(weight.shape) != expected:
                raise CheckpointError(f"{name} must be {list(expected)}, got {list(weight.shape)}")
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            qweight, scale = layer._perform_deployment()
            if not bool(torch.isfinite(scale).all()):
                self._quantizer.nonfinite.append(name)
            layer.commit_packed(qweight, scale)
            for tensor in (layer.qweight, layer.qweight_scale):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            if missing_keys is not None:
                # One module can stand under several names.
                missing_keys -= self._quantizer.weight_names.get(name, {name})
        return {}


def mark_quantized(model: PreTrainedModel, quantizer: BitLabHfQuantizer) -> None:
    """Makes a model with packed layers a quantized one in transformers' eyes."""
    attributes: Any = model
    attributes.hf_quantizer = quantizer
    attributes.is_quantized = True
    attributes.quantization_method = QUANT_METHOD


def _mark_latent(model: PreTrainedModel) -> None:
    """Makes a latent model a float model in transformers' eyes; its configuration stays."""
    attributes: Any = model
    del attributes.hf_quantizer
    attributes.is_quantized = False
    del attributes.quantization_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def _ignore(model: PreTrainedModel, kind: str, names: list[str]) -> None:
    """Adds keys that a load may find missing or unexpected without a word."""
    attribute = f"_keys_to_ignore_on_load_{kind}"
    patterns = {f"^{re.escape(name)}$" for name in names}
    setattr(model, attribute, set(getattr(model, attribute) or ()) | patterns)


def register() -> None:
    """Registers BitLab with transformers; calling it again changes nothing."""
    from transformers.quantizers import auto

    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(BitLabConfig)
    register_quantizer(QUANT_METHOD)(BitLabHfQuantizer)
    # Only classes in this tuple may say something at load about a file that has a configuration.
    types: tuple[Any, ...] = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, BitLabConfig)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = types
