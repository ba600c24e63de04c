"""vLLM's output head and embedding with int8 rows, tied or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bitcore.errors import CheckpointError


class Int8Method(QuantizeMethodBase):
    """Looks up and multiplies int8 rows with a float32 scale each.

    Args:
        name: The checkpoint's name of the module that holds them, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers ``qweight`` and ``qweight_scale``, which vLLM fills with this process's rows,
        and zeros behind them.
        """
        rows = sum(output_partition_sizes)
        # NaN tells what no file has filled.
        tensors = {
            "qweight": torch.empty(rows, input_size_per_partition, dtype=torch.int8),
            "qweight_scale": torch.full((rows,), torch.nan, dtype=torch.float32),
        }
        for leaf, tensor in tensors.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra})
            layer.register_parameter(leaf, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks what was loaded.

        Raises:
            CheckpointError: A scale is missing or not a finite positive number, or a code is -128.
        """
        rows = layer.num_org_embeddings_per_partition
        scale = layer.qweight_scale[:rows]
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise CheckpointError(
                f"{self._name}.qweight_scale must be finite and positive, got other values or none"
                "\nThe file is damaged; fetch or write it again."
            )
        if rows and int(layer.qweight[:rows].min()) == -128:
            raise CheckpointError(
                f"{self._name}.qweight must be from -127 to 127, got -128\n"
                "The file is damaged; fetch or write it again."
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiplies x [..., K] as an output head; returns [..., rows]."""
        y: Tensor = torch.ops.bitlab.linear_int8(
            x, layer.qweight, layer.qweight_scale, bias, x.dtype
        )
        return y

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Looks rows up: ids int [...]; returns [..., K] of the model's dtype."""
        codes = F.embedding(input_, layer.qweight).float()
        scale = layer.qweight_scale[input_].unsqueeze(-1)
        rows: Tensor = (codes * scale).to(layer.params_dtype)
        return rows

    def tie_weights(self, layer: nn.Module, embed_tokens: Any) -> nn.Module:
        """Makes the head use the embedding's rows."""
        layer.qweight = embed_tokens.qweight
        layer.qweight_scale = embed_tokens.qweight_scale
        return layer
