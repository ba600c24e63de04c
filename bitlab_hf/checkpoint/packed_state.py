"""What a deployed model's file holds: its state dict, each tensor once, and the header's fields."""

from __future__ import annotations

import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitlab_hf.checkpoint.headers import LAYERS_KEY, MODEL_NAMES, NAMES_KEY
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.int8 import int8_modules, is_borrower
from bitlab_hf.model.parts import gathered, parts
from bitlab_hf.model.rows import stored_elsewhere
from bitlab_hf.model.tree import quantized_layers, ternary_modules
from bitlayers.state import SCALES


def packed_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state dict of a deployed model with its sentinel, and the metadata.

    A module under two names is stored once, and so are tensors that the model ties. A qweight that
    two layers, or experts, share without being tied by name is stored twice: a file has no way to
    say so.
    """
    layers, int8 = quantized_layers(model), int8_modules(model)
    state = dict(model.state_dict())
    for found in parts(model):
        whole = gathered(found.module)
        state |= {f"{name}.{leaf}": whole[leaf] for name in found.names for leaf in whole}
    tied = stored_elsewhere(model)
    stored: set[int] = set()
    ternary = ternary_modules(model)
    for found in ternary:
        name, *aliases = found.names
        _drop(state, aliases)
        if found.module.packs_itself:
            continue
        if f"{name}.qweight" in tied:
            for leaf in ("qweight", *SCALES):
                state.pop(f"{name}.{leaf}", None)
            continue
        if id(found.module.qweight) in stored:
            state[f"{name}.qweight"] = state[f"{name}.qweight"].clone()
        stored.add(id(found.module.qweight))
        for key in (f"{name}.{leaf}" for leaf in SCALES):
            if key in state:
                state[key] = state[key].clone()
    for rows in int8:
        kept = [] if is_borrower(model, rows) else rows.names[:1]
        _drop(state, [name for name in rows.names if name not in kept])
    # What makes a load without BitLab fail instead of giving random weights.
    sentinel = next(
        (found.names[0] for found in layers if f"{found.names[0]}.weight" not in state), None
    )
    experts = expert_modules(model)
    for one in experts:
        name, *aliases = one.names
        _drop(state, aliases)
        for leaf in one.module.stacks:
            own = one.module.packed_stack(leaf)
            if f"{name}.{leaf}_qweight" not in tied and id(own["qweight"]) in stored:
                keys = [f"{name}.{leaf}_{end}" for end in own]
                state |= {key: state[key].clone() for key in keys}
            stored.add(id(own["qweight"]))
    if sentinel is not None:
        state[f"{sentinel}.weight"] = torch.empty(0, dtype=torch.uint8)
    elif experts:
        first = next(iter(experts[0].module.stacks))
        state[f"{experts[0].names[0]}.{first}"] = torch.empty(0, dtype=torch.uint8)
    names = [one.names[0] for one in ternary]
    names += [one.names[0] for one in experts] + [rows.names[0] for rows in int8]
    return state, {LAYERS_KEY: json.dumps(names), NAMES_KEY: MODEL_NAMES}


def _drop(state: dict[str, Tensor], modules: list[str]) -> None:
    prefixes = tuple(f"{name}." for name in modules)
    if prefixes:
        for key in [key for key in state if key.startswith(prefixes)]:
            del state[key]
