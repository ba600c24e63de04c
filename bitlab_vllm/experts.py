"""How vLLM's fused experts load and multiply packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from bitcore.config import BitQuantConfig
from bitcore.errors import ConfigError
from bitcore.ops_experts import counts_on_host
from bitlab_vllm.stacks import ArrivingExperts, Stack, own_experts, weighted_sum

_OTHERWISE = "Run `bitlab serve FOLDER --with-transformers`."
_COUNTED = (
    "Without int8 activations, or without BitLab's CUDA library, the host counts each expert's "
    "tokens, which no captured graph can do; start it with --enforce-eager."
)
# What stands between the two products, by vLLM's names.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class TernaryExpertsMethod(FusedMoEMethodBase):
    """Multiplies the packed weights of all experts of a layer, in one call a projection.

    Args:
        moe: vLLM's description of the layer.
        module: Its name in the checkpoint.
        first: How the gate and up projections are quantized.
        second: How the down projection is.

    Raises:
        ConfigError: vLLM asks for something between or around the products that is not done here.
    """

    def __init__(
        self, moe: Any, module: str, first: BitQuantConfig, second: BitQuantConfig
    ) -> None:
        super().__init__(moe)
        self._module, self._configs = module, (first, second)
        spread = moe.moe_parallel_config
        _require(module, "activation", moe.activation.value, _ACTIVATIONS)
        _require(module, "bias", moe.has_bias, (False,))
        _require(module, "data_parallel_size", spread.dp_size, (1,))
        _require(module, "prefill_context_parallel_size", spread.pcp_size, (1,))
        for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            _require(module, name, getattr(moe, name), (None,))
        device = torch.device(moe.device).type
        counted = [counts_on_host(device, one.activation) for one in self._configs]
        if device != "cpu" and any(counted):
            eager = get_current_vllm_config().model_config.enforce_eager
            _require(module, "enforce_eager", eager, (True,), _COUNTED)
        # Of tensor and expert parallel one at most is more than one.
        self._rank = spread.tp_rank + spread.ep_rank
        self._processes = spread.tp_size * spread.ep_size
        self._own = own_experts(moe.num_experts, self._rank, self._processes)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Gives the layer a loader of its own, which takes the tensors as the checkpoint has
        them.
        """
        _require(
            self._module,
            "router weights on the input",
            layer.apply_router_weight_on_input,
            (False,),
        )
        inner, experts = self.moe.intermediate_size, self.moe.num_experts
        first, second = self._configs
        stacks = (
            Stack("gate_up_proj", experts, 2 * inner, hidden_size, first),
            Stack("down_proj", experts, hidden_size, inner, second),
        )
        device = torch.get_default_device()
        layer.bitlab_arriving = ArrivingExperts(self._module, stacks, self._own, device)
        layer.load_weights = layer.bitlab_arriving.load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Puts what has arrived in its place."""
        arriving = layer.__dict__.pop("bitlab_arriving", None)
        if arriving is not None:
            layer.bitlab_parts = torch.nn.ModuleList(arriving.parts())

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's is used."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Sends x [M, H] through each token's experts [M, k]; returns [M, H]."""
        first, second = layer.bitlab_parts
        index = (topk_ids.long() - self._own.start).reshape(-1)
        gate, up = first(x.contiguous(), index).chunk(2, dim=-1)
        rows = second(_ACTIVATIONS[layer.activation.value](gate) * up, index)
        if self._processes > 1:
            rows = tensor_model_parallel_all_reduce(rows)
        y = weighted_sum(rows, topk_weights)
        # vLLM adds the results of all processes up.
        return torch.zeros_like(y) if self._rank else y


def _require(module: str, what: str, given: Any, allowed: Any, fix: str = _OTHERWISE) -> None:
    if given not in allowed:
        wanted = list(allowed)
        raise ConfigError(
            f"bitlab: {what} of {module} must be {wanted[0] if len(wanted) == 1 else wanted} to be "
            f"served with ternary experts, got {given}\n{fix}"
        )
