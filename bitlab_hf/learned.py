"""Learned scales while a model loads: a float file has none, and packing has to wait for them."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from bitlab_hf.checkpoint import Checkpoint
from bitlab_hf.replace import Found, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.checks import check_deployable


def expect_learned_scales(
    model: PreTrainedModel, checkpoint: Checkpoint | None, was_converted: bool
) -> list[BitLayerBase]:
    """Lets a load pass without the learned scales that a float checkpoint cannot have.

    Returns:
        The layers whose scale has to start from the weight, once that is loaded.
    """
    lacking = []
    missing = set(model._keys_to_ignore_on_load_missing or ())
    for found in find_modules(model, BitLayerBase):
        names = [f"{name}.learned_scale" for name in found.names]
        stored = was_converted if checkpoint is None else bool(checkpoint.tensors.keys() & names)
        if found.module.learned_scale is not None and not stored:
            lacking.append(found.module)
            missing |= {f"^{re.escape(name)}$" for name in names}
    if lacking:
        model._keys_to_ignore_on_load_missing = missing
    return lacking


def deploy_learned(layers: list[Found[BitLayerBase]]) -> None:
    """Deploys the layers that were loaded latent because their weight and their scale arrive apart.

    Raises:
        NonFiniteError: A weight is not finite, or a scale not finite and positive.
    """
    learned = [found for found in layers if found.module.learned_scale is not None]
    for found in learned:
        check_deployable(found.module, f"{found.names[0]}.weight")
    for found in learned:
        found.module.deploy()
