"""The entry to vLLM: its configuration class for ``quant_method: bitlab``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from bitcore.errors import CheckpointError, ConfigError
from bitlab_vllm.experts import TernaryExpertsMethod
from bitlab_vllm.linear import PackedLinearMethod, PackedVocabularyMethod, TiedHeadMethod
from bitlab_vllm.scheme import FLOAT, INT8, METHOD, Form, Scheme

# Where vLLM's model has other names than transformers', which a checkpoint's are, by model type.
_RENAMED: dict[str, dict[str, dict[str, str]]] = {
    "mixtral": {
        "orig_to_new_substr": {".mlp.": ".block_sparse_moe."},
        # Experts that stay float.
        "orig_to_new_suffix": {".experts.gate_up_proj": ".experts.w13",
                               ".experts.down_proj": ".experts.w2"},
    }
}  # fmt: skip
_EXPERTS = ("gate_up_proj", "down_proj")
_EMBEDDING = ".embed_tokens.qweight"


class BitLabVllmConfig(QuantizationConfig):
    """Which of a model's layers are ternary, int8 or float.

    What is packed is what the files' headers say, and not what patterns of names in the
    configuration match.

    Args:
        scheme: The checkpoint's ``quantization_config``.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        # By vLLM's names: the checkpoint's name and the dtype, as safetensors calls it.
        self.stored: dict[str, tuple[str, str]] = {}
        self._renamed: dict[str, dict[str, str]] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitLabVllmConfig:
        """Reads ``quantization_config``; see `Scheme.from_dict` for errors."""
        return cls(Scheme.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Reads the headers of the checkpoint's files.

        Raises:
            CheckpointError: They hold no packed tensor.
        """
        found: Mapping[str, Any] = get_safetensors_params_metadata(model_name, revision=revision)
        # Of local files the headers' own fields are among them.
        self.stored = {
            name: (name, header["dtype"]) for name, header in found.items() if "dtype" in header
        }
        self._renamed = _RENAMED.get(getattr(hf_config, "model_type", ""), {})
        self.apply_vllm_mapper(self.get_checkpoint_weight_mapper())
        if not any(name.endswith("qweight") for name in self.stored):
            raise CheckpointError(
                f"bitlab: {model_name} must hold packed tensors in safetensors files, got none\n"
                "Fetch or write it again."
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Follows the names of the checkpoint to those of vLLM's model."""
        renamed = {hf_to_vllm_mapper.map_name(name): held for name, held in self.stored.items()}
        self.stored = {name: held for name, held in renamed.items() if name is not None}

    def get_checkpoint_weight_mapper(self) -> Any:
        """Returns how the names of the checkpoint become those that vLLM's model expects."""
        return WeightsMapper(**self._renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns how a layer loads and multiplies its weights.

        Raises:
            ConfigError: The checkpoint packs what is not served yet, or what cannot be served.
        """
        if isinstance(layer, LinearBase):
            names = self._names(prefix)
            if not any(map(self._is_packed, names)):
                return UnquantizedLinearMethod()
            return PackedLinearMethod(*self._forms(names))
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        packed = [name for name in self.stored if name.startswith(f"{prefix}.")]
        packed = [name.removeprefix(f"{prefix}.") for name in packed if "qweight" in name]
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix, packed)
        if packed:
            raise ConfigError(
                f"bitlab: {prefix} must be a linear layer to be served packed, "
                f"got {type(layer).__name__}\nRun `bitlab serve FOLDER --with-transformers`."
            )
        return None

    def _forms(self, names: list[str]) -> tuple[dict[str, Form], set[str]]:
        """How the layers of these names are held, by the checkpoint's names of them, and which have
        a norm of their input.
        """
        layers: dict[str, Form] = {}
        norms: set[str] = set()
        for name in names:
            leaf = "qweight" if self._is_packed(name) else "weight"
            stored, dtype = self.stored.get(f"{name}.{leaf}", (f"{name}.{leaf}", ""))
            original = stored.rpartition(".")[0]
            if leaf == "weight" or dtype == "I8":
                layers[original] = FLOAT if leaf == "weight" else INT8
                continue
            layers[original] = self.scheme.layer_config(original)
            if f"{name}.rms_norm.weight" in self.stored:
                norms.add(original)
            elif self.scheme.norms(original):
                raise CheckpointError(
                    f"{original}.rms_norm.weight must be in the checkpoint with sub_norm, got none"
                    "\nThe file is incomplete; fetch or write it again."
                )
        return layers, norms

    def _experts(self, layer: Any, prefix: str, packed: list[str]) -> QuantizeMethodBase | None:
        kept_whole = f"{prefix}.{_EXPERTS[0]}" in self.stored
        # vLLM passes over float experts whose names it does not know.
        if not packed and (not kept_whole or layer.ckpt_gate_proj_name == "gate_proj"):
            return None
        if {name.partition("_qweight")[0] for name in packed} != set(_EXPERTS):
            raise ConfigError(
                f"bitlab: {prefix} must hold {' and '.join(_EXPERTS)} of all experts, packed, to "
                f"be served, got {next(iter(packed), 'float ones')}\n"
                "Run `bitlab serve FOLDER --with-transformers`."
            )
        module = self.stored[f"{prefix}.{packed[0]}"][0].rpartition(".")[0]
        configs = [self.scheme.layer_config(module, f"{module}.{name}") for name in _EXPERTS]
        return TernaryExpertsMethod(layer.moe_config, module, *configs)

    def _vocabulary(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """An embedding or an output head, which may be tied to it and then has no tensors."""
        is_head = isinstance(layer, ParallelLMHead)
        if not prefix:
            # vLLM's Llama gives its embedding no name.
            named = [name for name in self.stored if name.endswith(_EMBEDDING)]
            prefix = named[0].removesuffix(".qweight") if named else ""
        if self._is_packed(prefix):
            return PackedVocabularyMethod(*self._forms([prefix]))
        packs = self.scheme.head == "int8" or self.scheme.embedding == "ternary"
        if is_head and packs and f"{prefix}.weight" not in self.stored:
            return TiedHeadMethod()
        return None

    def _names(self, prefix: str) -> list[str]:
        """The names of the layers that vLLM fuses into one."""
        stem, dot, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{stem}{dot}{part}" for part in parts]

    def _is_packed(self, name: str) -> bool:
        return f"{name}.qweight" in self.stored

    def get_name(self) -> Any:
        """The name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the kernels take."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs that the kernels are built for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the scheme stands in config.json."""
        return []
