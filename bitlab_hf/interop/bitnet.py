"""Checkpoints of transformers' own ``bitnet`` method, both ways.

Packed weights have the very bytes of `t2`, so they are memory-mapped as they lie. What differs is
the scale: the class ``BitLinear`` divides by it, ``AutoBitLinear`` offline multiplies by it; which
one is meant stands in config.json and nowhere else. ``AutoBitLinear`` online holds latent weights.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from bitcore.errors import ArgumentError, ArgumentTypeError, CheckpointError, ConfigError
from bitcore.norm import EPSILON
from bitlab_hf.checkpoint.files import own_safetensors, read_config, shard_keys
from bitlab_hf.checkpoint.headers import Checkpoint, TensorHeader, read_checkpoint
from bitlab_hf.checkpoint.rotated import check_not_rotated
from bitlab_hf.checkpoint.saving import save
from bitlab_hf.config import BitLabConfig, checked_patterns
from bitlab_hf.interop.expressible import check_modules
from bitlab_hf.interop.view import view_of
from bitlab_hf.model.marks import mark_quantized
from bitlab_hf.model.parts import check_whole
from bitlab_hf.model.tree import Found, find_modules, quantized_layers
from bitlab_hf.quantizer import BitLabHfQuantizer
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.rmsnorm import RMSNormBitLinear

_METHOD = "bitnet-as-bitlab"
_HUB_OPTIONS = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision",
    "subfolder", "token", "trust_remote_code",
)  # fmt: skip


class BitNetSource(BitLabConfig):
    """What a bitnet checkpoint says of itself, in BitLab's words while it is loaded.

    Args:
        stock: The checkpoint's own ``quantization_config``.
        options: Those of one load, see `BitLabConfig`.

    Raises:
        ConfigError: It is no bitnet checkpoint, a field has a value that bitnet does not know, or
            one says that weights are rotated.
    """

    def __init__(self, stock: dict[str, Any], **options: Any) -> None:
        method = str(getattr(stock.get("quant_method"), "value", stock.get("quant_method")))
        if method != "bitnet":
            fix = "\nLoad it with from_pretrained." if method == "bitlab" else ""
            raise ConfigError(f"load_bitnet: quant_method must be 'bitnet', got {method!r}{fix}")
        check_not_rotated("load_bitnet", stock)
        for name, default, allowed in (
            ("linear_class", "bitlinear", ("bitlinear", "autobitlinear")),
            ("quantization_mode", "offline", ("offline", "online")),
        ):
            if stock.get(name, default) not in allowed:
                raise ConfigError(
                    f"load_bitnet: {name} must be one of {allowed}, got {stock[name]!r}"
                )
        if stock.get("use_rms_norm") and stock.get("rms_norm_eps", EPSILON) != EPSILON:
            raise ConfigError(
                f"load_bitnet: rms_norm_eps must be {EPSILON} with use_rms_norm, "
                f"got {stock['rms_norm_eps']}"
            )
        self.divides = stock.get("linear_class", "bitlinear") == "bitlinear"
        packed = self.divides or stock.get("quantization_mode", "offline") == "offline"
        self.skipped = checked_patterns(
            "modules_to_not_convert", stock.get("modules_to_not_convert"), "load_bitnet"
        )
        super().__init__(
            layer="RMSNormBitLinear" if stock.get("use_rms_norm") else "BitLinear",
            weight_format="packed" if packed else "latent",
            **options,
        )
        self.quant_method = cast(QuantizationMethod, _METHOD)

    def plain(self) -> BitLabConfig:
        """Returns BitLab's own configuration of the loaded model."""
        fields = self.to_dict()
        for name in ("divides", "skipped", "quant_method"):
            del fields[name]
        return BitLabConfig(**fields)


class BitNetQuantizer(BitLabHfQuantizer):
    """Loads what a bitnet file holds into BitLab's layers."""

    quantization_config: BitNetSource

    def __init__(self, quantization_config: BitNetSource, **kwargs: Any) -> None:
        # transformers does not see that the configuration came from the checkpoint.
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self._renamings: list[WeightRenaming] = []

    def _read_checkpoint(self, model: PreTrainedModel, files: list[str] | None) -> Checkpoint:
        files = own_safetensors(model.name_or_path, files, "load_bitnet")
        if files is None:
            raise CheckpointError(
                "load_bitnet: the checkpoint must be safetensors files, got others\n"
                "Load and save it once with an older transformers."
            )
        keys = shard_keys([Path(file) for file in files], "load_bitnet")
        scaled = [key.removesuffix("_scale") for key in keys if key.endswith(".weight_scale")]
        self._renamings = [
            WeightRenaming(
                "^" + re.escape(key) + "(?=_scale$|$)", key.removesuffix("weight") + "qweight"
            )
            for key in scaled
        ]
        checkpoint = read_checkpoint(model, files, self)
        assert checkpoint is not None
        converted = self._converted_by_stock(model)
        for found in find_modules(model, nn.Linear):
            for name in found.names:
                self._check_layer(name, name in converted, checkpoint)
        head = model.get_output_embeddings()
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        config = self.quantization_config
        config.modules_to_not_convert = sorted(set(linears) - converted)
        if any(name in converted for name, module in model.named_modules() if module is head):
            config.head = "ternary"
        tensors = {
            # They are read into float32, from whatever they are stored in.
            name: TensorHeader(header.key, "F32", header.shape)
            if name.endswith(".qweight_scale") and header.dtype in ("F32", "BF16", "F16")
            else header
            for name, header in checkpoint.tensors.items()
        }
        return Checkpoint(tensors, checkpoint.layers, files=checkpoint.files)

    def _converted_by_stock(self, model: PreTrainedModel) -> set[str]:
        """Returns the names of the linear layers that transformers itself would convert."""
        skip = HfQuantizer.get_modules_to_not_convert(
            model, self.quantization_config.skipped, sorted(model._keep_in_fp32_modules or ())
        )
        tied = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
        return {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and should_convert_module(name, skip)
            and name not in tied
        }

    def _check_layer(self, name: str, converted: bool, checkpoint: Checkpoint) -> None:
        """Refuses a file that is not what its configuration says."""
        known = checkpoint.tensors
        packed, weight = known.get(f"{name}.qweight"), known.get(f"{name}.weight")
        config_ends = "\nconfig.json and the tensors do not belong together."
        if weight is not None and weight.dtype == "U8":
            raise CheckpointError(f"{name}.weight_scale must be in the checkpoint, got none")
        if not self.file_is_packed:
            if packed is not None:
                raise CheckpointError(
                    f"{name}.weight must be float with quantization_mode='online', got it with a "
                    f"weight_scale{config_ends}"
                )
            return
        if packed is not None and packed.dtype != "U8":
            raise CheckpointError(
                f"{name}.weight must be packed uint8 with quantization_mode='offline', "
                f"got {packed.dtype}{config_ends}"
            )
        if packed is not None and not converted:
            raise CheckpointError(
                f"{name} must not be in modules_to_not_convert, got one that is packed in the "
                f"checkpoint{config_ends}"
            )
        # A head of the task stands alone and may be new.
        if converted and packed is None and (weight is not None or "." in name):
            held = "none" if weight is None else f"float {weight.dtype}"
            raise CheckpointError(
                f"{name}.weight must be packed uint8 in the checkpoint, got {held}{config_ends}"
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Adds BitLab's names of the packed tensors."""
        return [*super().update_weight_conversions(weight_conversions, model), *self._renamings]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        layers = quantized_layers(model)
        if self.file_is_packed:
            if config.divides:
                for found in layers:
                    found.module.qweight_scale = 1.0 / found.module.qweight_scale
            if config.verify:
                self._check_convention(layers)
        super()._process_model_after_weight_loading(model, **kwargs)
        plain = config.plain()
        model.config.quantization_config = plain
        if self.build_packed:
            mark_quantized(model, BitLabHfQuantizer(plain, pre_quantized=True))
        # What is saved from here on has BitLab's names.
        attributes: Any = model
        attributes._weight_conversions = [
            item for item in attributes._weight_conversions or [] if item not in self._renamings
        ]

    def _check_convention(self, layers: list[Found[BitLayerBase]]) -> None:
        """Refuses scales that only the other convention explains.

        A scale is the mean of a matrix's absolute weights, and far below 1 in any trained network.
        """
        scales = torch.cat([found.module.qweight_scale.detach().cpu() for found in layers])
        if not scales.is_meta and scales.median() > 1:
            says = "bitlinear" if self.quantization_config.divides else "autobitlinear"
            other = "autobitlinear" if self.quantization_config.divides else "bitlinear"
            raise CheckpointError(
                f"load_bitnet: linear_class must be what the scales mean, got {says!r}, with which "
                f"the median weight is {float(scales.median()):.3g}\n"
                f"Set linear_class={other!r} in config.json, or pass verify=False if it is right."
            )


if _METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(_METHOD)(BitNetQuantizer)


def load_bitnet(
    path_or_repo: str | os.PathLike[str],
    *,
    auto_class: Any = AutoModelForCausalLM,
    mode: str = "auto",
    latent_dtype: str = "float32",
    verify: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a checkpoint of transformers' ``bitnet`` method into BitLab's layers.

    A packed one is memory-mapped and becomes a deployed model; a latent one (``autobitlinear``
    online) becomes a latent model for training. From there on it is BitLab's: it saves as such.

    Args:
        path_or_repo: Folder or hub name.
        auto_class: Which of transformers' auto classes loads it.
        mode: See `BitLabConfig`.
        latent_dtype: See `BitLabConfig`.
        verify: Whether to scan for damage, and for scales that belie the configuration.
        kwargs: Passed to ``from_pretrained``.

    Returns:
        The model. Weight codes are the file's; a scale is the file's, or in the ``bitlinear``
        convention its reciprocal, rounded once to float32.

    Raises:
        ConfigError: config.json is not of a bitnet checkpoint, holds an unknown value, or says that
            weights are rotated.
        CheckpointError: The tensors are not what config.json says.
    """
    if Path(path_or_repo).is_dir() and not kwargs.get("subfolder"):
        # What is damaged is named before transformers reads it.
        read_config(Path(path_or_repo))
    hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    config = AutoConfig.from_pretrained(path_or_repo, **hub)
    stock = getattr(config, "quantization_config", None)
    if not isinstance(stock, dict):
        raise ConfigError(
            "load_bitnet: config.json must hold a quantization_config with quant_method 'bitnet', "
            "got none\nLoad it with from_pretrained."
        )
    source = BitNetSource(stock, mode=mode, latent_dtype=latent_dtype, verify=verify)
    del config.quantization_config
    model = auto_class.from_pretrained(
        path_or_repo, config=config, quantization_config=source, **kwargs
    )
    return cast(PreTrainedModel, model)


def export_bitnet(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    **kwargs: Any,
) -> None:
    """Writes a model as a ``bitnet`` checkpoint that transformers loads without BitLab.

    It is of the class ``bitlinear``, the one in which biases are right: scales are stored as their
    reciprocals in float32, which transformers casts to the model's dtype. The folder is written
    beside and put in place in one step.

    Args:
        model: A latent or deployed model; it is left as it is.
        directory: Where to write; made if needed.
        tokenizer: A tokenizer or processor to save beside the model.
        kwargs: Passed to ``save_pretrained``, such as ``max_shard_size``.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: bitnet cannot express a layer; the message says why and what can.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            f"export_bitnet: model must be a transformers PreTrainedModel, "
            f"got {type(model).__name__}"
        )
    check_whole("export_bitnet", model)
    layers = quantized_layers(model)
    _check_expressible(model, layers)
    names = {name for found in layers for name in found.names}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in names or name.endswith(".bias")
    }
    seen: set[int] = set()
    for found in layers:
        qweight, scale = found.module.packed()
        for name in found.names:
            # A tensor of its own under each name: a file cannot share them.
            shared = qweight.data_ptr() in seen
            seen.add(qweight.data_ptr())
            state[f"{name}.weight"] = qweight.detach().clone() if shared else qweight.detach()
            state[f"{name}.weight_scale"] = 1.0 / scale.float()
            if found.module.bias is not None:
                state[f"{name}.bias"] = found.module.bias.detach().clone()
    scheme = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": sorted(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in names
        ),
        "use_rms_norm": isinstance(layers[0].module, RMSNormBitLinear),
        "rms_norm_eps": EPSILON,
    }
    view = view_of("export_bitnet", model, layers, scheme)
    save(view, directory, tokenizer=tokenizer, state_dict=state, **kwargs)


def _check_expressible(model: PreTrainedModel, layers: list[Found[BitLayerBase]]) -> None:
    alternatives = (
        "\nUse bitlab_hf.save, or model.dequantize() and save_pretrained for a float checkpoint."
    )
    if not layers:
        raise ArgumentError("export_bitnet: model must hold quantized layers, got none")
    kinds = {type(found.module) for found in layers}
    if len(kinds) > 1:
        raise ArgumentError(
            "export_bitnet: model must hold one class of layers, got "
            f"{sorted(kind.__name__ for kind in kinds)}{alternatives}"
        )
    check_modules(
        "export_bitnet",
        model,
        lambda module: type(module) in (BitLinear, RMSNormBitLinear),
        alternatives,
    )
    for found in layers:
        module, config = found.module, found.module.quant_config
        problem = None
        if config.weight_granularity != "per_tensor":
            problem = f"one scale for the matrix, got {config.weight_granularity} scales"
        elif config.activation != "int8_per_token":
            problem = f"activations of int8 per token, got {config.activation}"
        elif module.out_features % 4:
            problem = f"a multiple of 4 outputs, got {module.out_features}"
        if problem is not None:
            raise ArgumentError(
                f"export_bitnet: {found.names[0]} must have {problem}{alternatives}"
            )
