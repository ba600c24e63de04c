"""TRL on ternary models: its fused losses see the head as it computes, its references are ternary.

TRL's trainers multiply hidden states by the output head's weight themselves, and load a reference
model anew from the path of the policy. Both would be a float model's. Their functions are wrapped
where they are defined, when TRL's trainers are first imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType, ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.deploy import described
from bitlab_hf.model.exposed import exposed_head, is_rounded
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.peft.arrival import when_imported

_UTILS, _MODELS = "trl.trainer.utils", "trl.models.utils"


def install() -> None:
    """Wraps TRL's functions, now or when TRL is imported; calling it again changes nothing."""
    when_imported(_UTILS, _wrap_utils)
    when_imported(_MODELS, _wrap_models)


def _wrap_utils(utils: Any) -> None:
    for name, wrapper in (("add_fused_lm_head", _fusing), ("create_model_from_path", _loading)):
        _replace(utils, name, wrapper)


def _wrap_models(models: Any) -> None:
    redirection = getattr(models, "_ForwardRedirection", None)
    if redirection is not None:
        _replace(redirection, "__call__", _redirecting)


def _replace(holder: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    found = getattr(holder, name, None)
    if found is not None and not hasattr(found, "_bitlab_wrapped"):
        wrapped = wrapper(found)
        wrapped._bitlab_wrapped = True
        setattr(holder, name, wrapped)
        if isinstance(holder, ModuleType):
            # Other modules have imported it by name, where they were there before BitLab.
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(name) is found:
                    setattr(module, name, wrapped)


def _fusing(add: Callable[..., None]) -> Callable[..., None]:
    """The forward that a fused head is given runs with the head exposed."""

    @wraps(add)
    def added(model: Any, *args: Any, **kwargs: Any) -> None:
        add(model, *args, **kwargs)
        if not is_rounded(model.get_output_embeddings()):
            return
        fused = model.forward.__func__

        # `generate` and the Trainer read the signature; a method, so that a copy has its own.
        @wraps(fused)
        def forward(self: Any, *given: Any, **named: Any) -> Any:
            if not named.get("fused_lm_head"):
                return fused(self, *given, **named)
            with exposed_head(self):
                return fused(self, *given, **named)

        model.forward = MethodType(forward, model)

    return added


def _redirecting(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes the place of a model's forward makes its logits itself, if any."""

    @wraps(call)
    def redirected(
        self: Any, wrapper: Any, model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        # The loss may compare the model with others that the trainer holds, such as a teacher.
        held = [model, *vars(getattr(method, "__self__", model)).values()]
        read = {id(one): one for one in map(_unwrapped, held) if one is not None}

        @wraps(method)
        def exposed(*given: Any, **named: Any) -> Any:
            with ExitStack() as stack:
                for one in read.values():
                    stack.enter_context(exposed_head(one))
                return method(*given, **named)

        return call(self, wrapper, model, exposed, *args, **kwargs)

    return redirected


def _unwrapped(value: Any) -> PreTrainedModel | None:
    """Returns the transformers model in a wrapper of PEFT or of data parallel, if it is one."""
    if not isinstance(value, nn.Module):
        return None
    value = getattr(value, "module", value)
    value = value.get_base_model() if hasattr(value, "get_base_model") else value
    return value if isinstance(value, PreTrainedModel) else None


def _loading(create: Callable[..., Any]) -> Callable[..., Any]:
    """A model that a trainer loads from the path of its own latent one is latent in the same way.

    TRL passes a path and no model; the trainer that asks holds it.
    """

    @wraps(create)
    def created(model_id: str, *args: Any, **kwargs: Any) -> Any:
        policy = getattr(sys._getframe(1).f_locals.get("self"), "model", None)
        if kwargs.get("quantization_config") is None:
            config = _latent_config(policy, model_id)
            if config is not None:
                kwargs["quantization_config"] = config
        return create(model_id, *args, **kwargs)

    return created


def _latent_config(policy: Any, model_id: str) -> BitLabConfig | None:
    """Returns how a model was made latent that was loaded from a path of float weights."""
    own = getattr(policy, "config", None)
    if own is None or getattr(own, "_name_or_path", None) != str(model_id):
        return None
    layers = quantized_layers(policy)
    if not layers or any(layer.module.is_deployed for layer in layers):
        return None
    stored, _ = PreTrainedConfig.get_config_dict(model_id)
    if stored.get("quantization_config"):
        # The file says it itself.
        return None
    config = getattr(own, "quantization_config", None)
    if not isinstance(config, BitLabConfig):
        config = described(policy)
        if is_rounded(policy.get_output_embeddings()):
            config.head = "ternary"
    return config
