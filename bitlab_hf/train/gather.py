"""FSDP2's gathers of packed weights, switched on for a model or a Trainer."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import TrainerCallback

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.model.parts import part_of
from bitlab_hf.model.tree import quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.gathered import PackedShard

logger = logging.getLogger("bitlab")
# FSDP, and FSDP within machines beside copies of the model.
_PLACES = ((Shard(0),), (Replicate(), Shard(0)))


def pack_all_gather(model: nn.Module) -> list[str]:
    """Makes FSDP2 gather the weights of ternary layers packed: two bits a weight, and scales.

    Call it once the model is sharded, in every process, before its first forward pass. The forward
    and backward passes compute what they would of gathered floats, bit for bit, but under mixed
    precision: codes are those of the shards' float32 weights then, not of rounded ones. Gradients,
    optimizers and state dicts are as ever.

    Gathered as floats, as before, is what needs them: layers with other estimators than absmean, a
    quantization strength below 1 in the first forward pass, a number of rows that the processes do
    not divide, a weight that other modules hold too, or in tensor parallel; and all that is no
    `BitLinear`.

    Args:
        model: A model that ``torch.distributed.fsdp.fully_shard`` has sharded, with
            ``reshard_after_forward`` true or false.

    Returns:
        Names of the layers whose weights are gathered packed.

    Raises:
        ArgumentError: The model is not sharded by FSDP2.
        LifecycleError: It has run a forward pass since it was sharded.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        raise ArgumentError(
            "pack_all_gather: model must be sharded by FSDP2, got one that is not\n"
            "Call it after torch.distributed.fsdp.fully_shard; a Trainer shards with fsdp=True and "
            'fsdp_config={"version": 2, ...}.'
        )
    # torch looks for hooks when the first forward pass begins, and has a root from then on.
    has_run = any(unit._get_fsdp_state()._is_root is not None for unit in units)
    holders = Counter(id(one) for module in model.modules() for one in module._parameters.values())
    names = []
    for found in quantized_layers(model):
        weight: Any = found.module._parameters.get("weight")
        if not _is_packable(found.module) or holders[id(weight)] > 1:
            continue
        if not isinstance(weight._local_tensor, PackedShard):
            if has_run:
                raise LifecycleError(
                    "pack_all_gather: model must not have run since it was sharded, got one that "
                    "has\nCall it right after fully_shard."
                )
            weight._local_tensor = weight._local_tensor.as_subclass(PackedShard)
        names.append(found.names[0])
    return names


def _is_packable(layer: BitLayerBase) -> bool:
    weight: Any = layer._parameters.get("weight")
    if not isinstance(layer, BitLinear) or not isinstance(weight, DTensor):
        return False
    processes = weight.device_mesh.size(-1)
    return (
        type(layer)._train_forward is BitLinear._train_forward
        and layer.quant_config.weight_quantizer == "absmean"
        and part_of(layer) is None
        and tuple(weight.placements) in _PLACES
        and processes > 1
        and layer.out_features % processes == 0
    )


class PackedAllGather(TrainerCallback):
    """Calls `pack_all_gather` when a Trainer's training begins.

    ::

        Trainer(model=model, ..., callbacks=[PackedAllGather()])

    Raises:
        ArgumentError: When training begins: the model is not sharded by FSDP2.
        LifecycleError: When training begins: it was evaluated before.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Packs, and says for how many layers."""
        names = pack_all_gather(model)
        if state.is_world_process_zero:
            total = len(quantized_layers(model))
            logger.info("bitlab: %d of %d ternary layers gather packed", len(names), total)
