"""BitLabHfQuantizer: what transformers calls, and when.

Three ways to load, told apart by what the file holds and by `BitLabConfig.mode`:

- latent: the skeleton's linear layers are swapped, then everything loads as in a float model;
- packed at load: the same skeleton, and each weight is packed as it arrives from a float file;
- packed: the skeleton holds the packed tensors' shapes, and the file is memory-mapped into it.
"""

from __future__ import annotations

import copy
import json
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
from bitlab_hf.checkpoint.headers import (
    LAYERS_KEY,
    Checkpoint,
    check_format,
    check_nothing_left_packed,
    check_packed_headers,
    ignore_unexpected,
    read_checkpoint,
    split_by_presence,
    stored_int8,
    verify_int8,
    verify_packed,
    with_tied,
)
from bitlab_hf.checkpoint.learned import (
    deploy_learned,
    expect_learned_scales,
    expect_sub_norms,
    start_fresh,
)
from bitlab_hf.checkpoint.packing import PackAtLoad, stand_in_for_weights
from bitlab_hf.config import LOADING_ATTRIBUTES, QUANT_METHOD, BitLabConfig
from bitlab_hf.model.head import (
    Rows,
    find_head,
    finish,
    int8_modules,
    is_borrower,
    restore_float,
    swap_skeletons,
)
from bitlab_hf.model.marks import mark_latent, mark_quantized, untie_packed
from bitlab_hf.model.parallel import check_no_tensor_parallel
from bitlab_hf.model.replace import find_linears, skipped_modules, swap_latent, swap_packed
from bitlab_hf.model.tree import Found, quantized_layers, set_module
from bitlayers.base import BitLayerBase
from bitlayers.int8 import Int8Rows
from bitlayers.registry import get_layer
from bitlayers.rmsnorm import InputRMSNorm


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
        self.packing = PackAtLoad()
        # What is int8 once loaded: the output head with what is tied to it.
        self.int8: list[Rows] = []
        self.unlearned: list[BitLayerBase] = []
        self.fresh_norms: list[InputRMSNorm] = []

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
        checkpoint = self._read_checkpoint(model, checkpoint_files)
        if self.file_is_packed and checkpoint is None:
            raise CheckpointError(
                "bitlab: a deployed checkpoint must be read from its safetensors files, got a "
                "state dict or other files"
            )
        skip = skipped_modules(model, config, defaults=not self.was_converted)
        found = find_linears(model, skip)
        if checkpoint is not None:
            known = with_tied(checkpoint, model)
            if self.was_converted:
                check_format(known, self.file_is_packed, found)
            found, lacking = split_by_presence(
                found, known, self.file_is_packed, self.was_converted
            )
            skip += [name for layer in lacking for name in layer.names]
        config.modules_to_not_convert = sorted(set(skip))
        if config.head == "ternary":
            self._check_ternary_head(model, found)
        if self.file_is_packed:
            assert checkpoint is not None
            swap_packed(model, found, config)
            self.int8 = stored_int8(model, checkpoint, config)
            for rows in self.int8:
                swap_skeletons(model, rows)
            check_packed_headers(quantized_layers(model), checkpoint)
            check_nothing_left_packed(model, checkpoint)
            ignore_unexpected(model, checkpoint.sentinels())
        else:
            head = self._int8_head(model)
            swap_latent(model, found, config)
            self.unlearned = expect_learned_scales(model, checkpoint, self.was_converted)
            if self.build_packed:
                self.packing.add_layers(model, dtype, checkpoint)
                if head is not None:
                    self.packing.add_head(model, head, checkpoint)
                    self.int8 = [head]
                self._check_offload(device_map)
        self.fresh_norms = expect_sub_norms(model, checkpoint, self.was_converted)
        stand_in_for_weights(model)

    def _read_checkpoint(
        self, model: PreTrainedModel, files: list[str] | None
    ) -> Checkpoint | None:
        return read_checkpoint(model, files, self)

    def _check_ternary_head(self, model: PreTrainedModel, found: list[Found[nn.Linear]]) -> None:
        """Refuses heads that cannot be converted as asked, rather than leave them as they are."""
        head = model.get_output_embeddings()
        if head is None and self.was_converted:
            # The base model of a file whose head is ternary.
            return
        if not any(layer.module is head for layer in found):
            raise ConfigError(
                'bitlab: head="ternary" must find an output head that is an nn.Linear, got '
                f"{type(head).__name__}"
            )
        names = {f"{name}.weight" for layer in found for name in layer.names}
        tied = any(names.intersection(pair) for pair in model.all_tied_weights_keys.items())
        if not tied:
            return
        if self.file_is_packed:
            raise CheckpointError(
                "bitlab: a packed head must not be tied, got tie_word_embeddings=true\n"
                "config.json and the tensors do not belong together."
            )
        if self.build_packed:
            raise ConfigError(
                "bitlab: a tied head must not be packed at load, got one tied to the embedding\n"
                'Load it latent with head="ternary", then call deploy(model).'
            )
        held = head.weight.dtype
        if self.quantization_config.latent_dtype == "float32" and held != torch.float32:
            raise ConfigError(
                f"bitlab: a tied ternary head must be float32 with the embedding, got {held}\n"
                'Pass dtype=torch.float32, or latent_dtype="keep".'
            )

    def _int8_head(self, model: PreTrainedModel) -> Rows | None:
        """Returns the head that is to be int8, refused early where it cannot be."""
        if self.quantization_config.head != "int8":
            return None
        head = find_head(model)
        if head is None and not self.was_converted:
            raise ConfigError(
                'bitlab: head="int8" must find an output head that is an nn.Linear, got none'
            )
        return head

    def _check_offload(self, device_map: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "bitlab: device_map must not offload to disk while packing at load, got 'disk'\n"
                "Deploy and save the model once, then load that checkpoint with any device_map."
            )

    # While the weights arrive.

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Tells whether a parameter is a float weight to be packed or quantized at load."""
        if not self.build_packed or self.file_is_packed:
            return False
        return self.packing.takes(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return self.packing

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Returns the bytes of an element of a parameter once it is loaded."""
        if any(param_name == f"{name}.weight" for rows in self.int8 for name in rows.names):
            # Not packed four to a byte, as the layers are.
            return 1
        size: float = super().param_element_size(model, param_name, param)
        return size

    @property
    def quantized_element_size(self) -> float | None:
        return 0.25

    # After the weights.

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        start_fresh(self.unlearned, self.fresh_norms)
        if not self.build_packed:
            mark_latent(model)
            return
        if not self.file_is_packed:
            self._check_offload(getattr(model, "hf_device_map", None))
        nonfinite = self.packing.nonfinite
        if nonfinite:
            raise NonFiniteError(
                f"{nonfinite[0]} must be finite to be packed, got NaN or infinity"
                + (f" (and {len(nonfinite) - 1} more)" if len(nonfinite) > 1 else "")
            )
        if self.packing.differing:
            raise CheckpointError(
                f"{self.packing.differing[0]} must have the values of the weight that it is tied "
                "to, got others\nSet tie_word_embeddings to false in config.json."
            )
        layers = quantized_layers(model)
        deploy_learned(layers)
        for found in layers:
            layer = found.module
            if not layer.is_deployed:
                raise CheckpointError(
                    f"{found.names[0]}.weight must be in the checkpoint to be packed, got none"
                )
            layer.qweight.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
        for rows in self.int8:
            if not isinstance(rows.members[0].module, Int8Rows):
                raise CheckpointError(
                    f"{rows.owner}.weight must be in the checkpoint to be quantized, got none"
                )
            finish(model, rows)
        # They hold modules, which are the model's alone from here on.
        self.packing, self.int8 = PackAtLoad(), []
        if self.file_is_packed and self.quantization_config.verify:
            verify_packed(layers)
            verify_int8(model)
        untie_packed(model)
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
        layers = quantized_layers(model)
        state = dict(model.state_dict())
        seen: set[int] = set()
        for found in layers:
            # One module under two names is stored once; a qweight that two layers share, twice: a
            # file has no way to say so.
            for alias in found.names[1:]:
                for leaf in ("qweight", "qweight_scale", "bias"):
                    state.pop(f"{alias}.{leaf}", None)
            name = found.names[0]
            if id(found.module.qweight) in seen:
                state[f"{name}.qweight"] = state[f"{name}.qweight"].clone()
            seen.add(id(found.module.qweight))
            state[f"{name}.qweight_scale"] = state[f"{name}.qweight_scale"].clone()
        state[f"{layers[0].names[0]}.weight"] = torch.empty(0, dtype=torch.uint8)
        names = [found.names[0] for found in layers]
        for rows in int8_modules(model):
            names.append(rows.names[0])
            stored = () if is_borrower(model, rows) else rows.names[:1]
            for alias in rows.names:
                if alias not in stored:
                    for leaf in ("qweight", "qweight_scale", "bias"):
                        state.pop(f"{alias}.{leaf}", None)
        return state, {LAYERS_KEY: json.dumps(names)}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Puts ``nn.Linear`` layers back, with exactly codes times scale (rounded to dtype)."""
        weights: dict[int, nn.Parameter] = {}
        for found in quantized_layers(model):
            layer = found.module
            if getattr(layer, "rms_norm", None) is not None:
                raise LifecycleError(
                    f"dequantize: {found.names[0]} must be a linear layer alone, got one behind a "
                    "norm"
                )
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
        restore_float(model, dtype)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Refuses tensor parallel, and keeps experts from being split."""
        check_no_tensor_parallel("bitlab", getattr(model.config, "distributed_config", None))
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
