"""Clear errors where PEFT would read or rewrite a weight that ternary layers do not have.

PEFT knows the quantization methods that it cannot merge by name and offers no hook for others, so
two of its methods are wrapped, when it is imported and not before: importing PEFT costs more than
importing BitLab.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from bitcore.errors import LifecycleError
from bitlayers.base import BitLayerBase

_TUNERS, _LORA = "peft.tuners.tuners_utils", "peft.tuners.lora.model"
# These write the weight minus the adapter back; ternarized again, it is another model.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# These only read the weight.
_READING = ("orthogonal",)


def check_mergeable(model: nn.Module) -> None:
    """Refuses PEFT's own merge where a deployed layer is among the adapted ones.

    Raises:
        LifecycleError: A deployed layer has an adapter; the message names the layer.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, BitLayerBase) and base.is_deployed:
            raise LifecycleError(
                f"merge: {name} must have a float weight to add an adapter to, got a deployed "
                "layer\nCall bitlab_hf.merge_and_requantize(peft_model), which ternarizes the sum "
                "and reports the drift, or keep the adapter unmerged."
            )


def check_adapter(config: Any, target: nn.Module, name: str) -> None:
    """Refuses a LoRA variant that needs, or rewrites, a weight that the layer does not have.

    Args:
        config: PEFT's LoraConfig.
        target: The layer, adapted already or not.
        name: Its name.

    Raises:
        LifecycleError: The variant cannot work on this layer.
    """
    base: Any = target
    while hasattr(base, "base_layer"):
        base = base.base_layer
    if not isinstance(base, BitLayerBase):
        return
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if base.is_deployed and getattr(config, "use_dora", False):
        raise LifecycleError(
            f"LoRA: use_dora must be False on the deployed layer {name}, got True: DoRA reads the "
            "float weight\nUse plain LoRA, or adapt the latent model."
        )
    if start.startswith(_REWRITING) or (base.is_deployed and start.startswith(_READING)):
        state = "deployed" if base.is_deployed else "latent"
        raise LifecycleError(
            f"LoRA: init_lora_weights must be True, False or 'gaussian' on the {state} layer "
            f"{name}, got {config.init_lora_weights!r}: it works on the float weight, which the "
            "layer lacks or ternarizes again\nLeave init_lora_weights at its default."
        )


def install() -> None:
    """Wraps PEFT's methods, now or when PEFT is imported; calling it again changes nothing."""
    if _LORA in sys.modules:
        _wrap()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _wrap() -> None:
    tuner: Any = sys.modules[_TUNERS].BaseTuner
    lora: Any = sys.modules[_LORA].LoraModel
    if getattr(tuner, "_bitlab_guarded", False):
        return
    tuner._bitlab_guarded = True

    def before_merge(self: Any, *_: Any) -> None:
        check_mergeable(self.model)

    def before_adapter(
        self: Any, config: Any, adapter: str, target: nn.Module, target_name: str, *rest: Any
    ) -> None:
        check_adapter(config, target, rest[1] if len(rest) > 1 else target_name)

    tuner._check_merge_allowed = _after(before_merge, tuner._check_merge_allowed)
    lora._create_and_replace = _after(before_adapter, lora._create_and_replace)


def _after(check: Callable[..., None], method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("lora_config", "adapter_name", "target", "target_name", "parent", "current_key")
        # PEFT passes some of them by name.
        given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        check(self, *given)
        return method(self, *args, **kwargs)

    return checked


class _Finder:
    """Finds nothing itself: it acts when PEFT's LoRA module has been executed, and leaves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LORA:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                # The instance's attribute hides the method until now.
                del loader.exec_module
                execute(module)
                _wrap()

            loader.exec_module = exec_module
        return spec
