"""Packing at load: what happens to the weights of a float file that is loaded to be run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from bitcore.errors import ConfigError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf.checkpoint.headers import Checkpoint, check_float_header, with_tied
from bitlab_hf.model.head import Rows, swap_quantized
from bitlab_hf.model.tree import quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.int8 import Int8Rows


class PackAtLoad(ConversionOps):
    """Packs, or quantizes, each weight as it arrives from a float file.

    Attributes:
        nonfinite: Names of weights with NaN or infinity met on the way.
        differing: Names of weights that differ from one that they are tied to.
    """

    def __init__(self) -> None:
        # Not raised on the way: transformers would make a RuntimeError of it.
        self.nonfinite: list[str] = []
        self.differing: list[str] = []
        # Every name of a weight to take, by each of its names.
        self._names: dict[str, set[str]] = {}
        self._head: Rows | None = None

    def add_layers(
        self, model: PreTrainedModel, dtype: torch.dtype | None, checkpoint: Checkpoint | None
    ) -> None:
        """Takes the latent layers: packed from the file's own values, checked before the load.

        Raises:
            CheckpointError: A weight has another shape, or a dtype that cannot be packed.
        """
        keep = set(model._keep_in_fp32_modules_strict or ())
        for found in quantized_layers(model):
            if found.module.learned_scale is not None:
                continue
            names = {f"{name}.weight" for name in found.names}
            self._names.update(dict.fromkeys(names, names))
            for name in names:
                header = checkpoint.tensors.get(name) if checkpoint else None
                if header is None:
                    continue
                layer = found.module
                check_float_header(name, header, (layer.out_features, layer.in_features))
                if header.dtype == "F32" and dtype != torch.float32:
                    # transformers would round it to the model's dtype before packing.
                    keep.add(name)
        model._keep_in_fp32_modules_strict = keep

    def add_head(self, model: PreTrainedModel, rows: Rows, checkpoint: Checkpoint | None) -> None:
        """Takes the output head. It is quantized from the model's dtype, as `deploy` does it.

        Raises:
            ConfigError: The checkpoint has no head.
            CheckpointError: The head has another shape, or a dtype that cannot be quantized.
        """
        names = {f"{name}.weight" for name in rows.names}
        self._names.update(dict.fromkeys(names, names))
        self._head = rows
        if checkpoint is None:
            return
        known = with_tied(checkpoint, model)
        for name in sorted(names):
            if name not in known.tensors:
                raise ConfigError(
                    f'bitlab: head="int8" must find {name} in the checkpoint, got a new head\n'
                    'Load it latent with head="int8", then call deploy(model).'
                )
            check_float_header(name, known.tensors[name], tuple(rows.tensor.shape))

    def is_head(self, name: str) -> bool:
        """Tells whether a parameter's name is one of the head's weight."""
        return self._head is not None and name.removesuffix(".weight") in self._head.names

    def takes(self, model: PreTrainedModel, name: str) -> bool:
        """Tells whether a parameter is to be packed or quantized."""
        module_name, _, leaf = name.rpartition(".")
        if leaf != "weight" or self.is_head(name):
            return leaf == "weight"
        module = model.get_submodule(module_name)
        if not isinstance(module, BitLayerBase) or module.is_deployed:
            return False
        return module.learned_scale is None

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
            pack = self._quantize_head if self.is_head(name) else self._pack_layer
            scale = pack(model, name, weight.detach())
            if not bool(torch.isfinite(scale).all()):
                self.nonfinite.append(name)
            if missing_keys is not None:
                # One module can stand under several names.
                missing_keys -= self._names.get(name, {name})
        return {}

    def _pack_layer(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, BitLayerBase)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.commit_packed(*layer.build_packed())
        for tensor in (layer.qweight, layer.qweight_scale):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        return layer.qweight_scale

    def _quantize_head(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        rows = self._head
        assert rows is not None
        qweight, scale = quantize_rows_int8(weight)
        built = rows.members[0].module
        if not isinstance(built, Int8Rows):
            swap_quantized(model, rows, qweight, scale)
        elif not torch.equal(built.qweight, qweight) or not torch.equal(built.qweight_scale, scale):
            self.differing.append(name)
        return scale


def stand_in_for_weights(model: PreTrainedModel) -> None:
    """Lets transformers initialize what a file lacks around layers that have no float weight.

    Some architectures initialize a linear layer from its parent (T5, wav2vec 2.0), and take its
    ``weight`` for a tensor. For as long as transformers does this, once, the layers show an empty
    one that counts as initialized.
    """
    initialize = model._initialize_missing_keys

    def initialize_missing_keys(*args: Any, **kwargs: Any) -> None:
        del vars(model)["_initialize_missing_keys"]
        layers = [
            module
            for module in model.modules()
            if isinstance(module, (BitLayerBase, Int8Rows))
            and module._parameters.get("weight") is None
        ]
        empty = torch.empty(0)
        vars(empty)["_is_hf_initialized"] = True
        for layer in layers:
            # An attribute of the instance hides the parameter that is None.
            vars(layer)["weight"] = empty
        try:
            initialize(*args, **kwargs)
        finally:
            for layer in layers:
                del vars(layer)["weight"]

    vars(model)["_initialize_missing_keys"] = initialize_missing_keys
