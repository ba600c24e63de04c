"""Clear errors where PEFT would read, train or rewrite a weight that ternary layers do not have.

PEFT knows the quantization methods that it cannot merge by name and offers no hook for others, so
some of its methods are wrapped, when it is imported and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from bitcore.errors import LifecycleError
from bitlab_hf.model.count import uncounted_weights
from bitlab_hf.peft.arrival import when_imported
from bitlab_hf.peft.seal import (
    base_of,
    is_packed,
    kind_of,
    plain,
    refusal,
    sealed,
    try_adapter,
    unwritten,
)
from bitlayers.base import BitLayerBase
from bitlayers.embedding import TernaryEmbedding
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Rows
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.quantized import QuantizedModule
from bitlayers.rmsnorm import RMSNormBitLinear

# These write the weight minus the adapter back; ternarized again, it is another model.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# These only read the weight.
_READING = ("orthogonal",)
# How PEFT passes the arguments of a tuner's `_create_and_replace`, where not by name.
_CREATE = ("config", "adapter_name", "target", "target_name", "parent", "current_key")


def check_mergeable(model: nn.Module) -> None:
    """Refuses PEFT's own merge where an adapted layer has no weight that the sum could become.

    Raises:
        LifecycleError: A packed layer or embedding has an adapter, or a layer with a norm of its
            own; the message names it.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, BitLayerBase) and base.is_deployed:
            raise LifecycleError(
                f"merge: {name} must have a float weight to add an adapter to, got a deployed "
                "layer\nCall bitlab_hf.merge_and_requantize(peft_model), which ternarizes the sum "
                "and reports the drift, or keep the adapter unmerged."
            )
        if isinstance(base, (Int8Rows, TernaryEmbedding)):
            raise LifecycleError(
                f"merge: {name} must have a float weight to add an adapter to, got "
                f"{kind_of(base)}\nKeep the adapter unmerged."
            )
        if isinstance(base, RMSNormBitLinear):
            raise own_norm("merge", name)


def own_norm(op: str, name: str) -> LifecycleError:
    """Returns the error of merging into a layer whose own norm the adapter does not read through.

    Args:
        op: Who merges.
        name: The layer's.
    """
    return LifecycleError(
        f"{op}: {name} must be a layer without a norm of its own, got an RMSNormBitLinear: its "
        "weight reads the normed input, the adapter the input itself, and no one weight does both"
        "\nKeep the adapter unmerged."
    )


def check_adapter(config: Any, target: nn.Module, name: str) -> None:
    """Refuses a LoRA variant that needs, or rewrites, a weight that the layer does not have.

    Args:
        config: PEFT's configuration of the adapter.
        target: The layer, adapted already or not.
        name: Its name.

    Raises:
        LifecycleError: The variant cannot work on this layer.
    """
    base: Any = base_of(target)
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


def check_parameters(config: Any, model: nn.Module) -> None:
    """Refuses adapters of the tensors of ternary experts: they would be added to a float tensor of
    all experts, which deployed ones do not have and latent ones ternarize.

    Args:
        config: PEFT's configuration of the adapter.
        model: What it is for.

    Raises:
        LifecycleError: It names such a tensor.
    """
    wanted = getattr(config, "target_parameters", None) or ()
    for module_name, module in model.named_modules():
        for leaf in module.stacks if isinstance(module, BitExperts) else ():
            name = plain(f"{module_name}.{leaf}")
            if any(f".{name}".endswith(f".{one}") for one in wanted):
                raise LifecycleError(
                    f"LoRA: target_parameters must name float Parameters, got {name} of ternary "
                    "experts\nAdapt linear layers with target_modules, or load the model with "
                    'BitLabConfig(experts="keep").'
                )


def install() -> None:
    """Wraps PEFT's methods, now or when PEFT is imported; calling it again changes nothing."""
    when_imported("peft", _wrap)


def _wrap(peft: Any) -> None:
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuner: Any = BaseTuner
    if getattr(tuner, "_bitlab_guarded", False):
        return
    tuner._bitlab_guarded = True
    tuner.__init__ = _sealing(tuner.__init__)
    tuner.inject_adapter = _guarded(tuner.inject_adapter)
    tuner._check_merge_allowed = _merging(tuner._check_merge_allowed)
    wrapper: Any = AuxiliaryTrainingWrapper
    wrapper.__init__ = _training(wrapper.__init__)
    for model in (peft.PeftModel, peft.PeftMixedModel):
        model.get_nb_trainable_parameters = _counting(model.get_nb_trainable_parameters)
    peft.PeftModel._setup_prompt_encoder = _prompting(peft.PeftModel._setup_prompt_encoder)


def _merging(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Any) -> Any:
        check_mergeable(self.model)
        return method(self)

    return checked


def _counting(method: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    @wraps(method)
    def counted(self: Any) -> tuple[int, int]:
        trained, held = method(self)
        return trained, held + uncounted_weights(self)

    return counted


def _training(method: Callable[..., None]) -> Callable[..., None]:
    """Guards the wrapper of a module that PEFT trains whole, or rows of."""

    @wraps(method)
    def checked(self: Any, module_to_save: Any, *args: Any, **kwargs: Any) -> None:
        rows = type(self).__name__ == "TrainableTokensWrapper"
        op = "trainable_token_indices" if rows else "modules_to_save"
        for name, module in module_to_save.named_modules():
            if is_packed(module) or (rows and isinstance(module, BitLayerBase)):
                requirement = "be a float layer to be trained"
                known = _NAMES.get(id(module), name) or type(module).__name__
                raise refusal(op, known, module, requirement)
        method(self, module_to_save, *args, **kwargs)

    return checked


# The names of a model's layers, while PEFT builds an adapter: its wrappers do not know them.
_NAMES: dict[int, str] = {}


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    modules = model.named_modules()
    names = {id(m): plain(n) for n, m in modules if isinstance(m, QuantizedModule)}
    added = names.keys() - _NAMES.keys()
    _NAMES.update(names)
    try:
        yield
    finally:
        for key in added:
            del _NAMES[key]


def _sealing(method: Callable[..., None]) -> Callable[..., None]:
    """Seals the weights for what a tuner reads before it builds its first adapter, too."""

    @wraps(method)
    def init(
        self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        with sealed(_method(peft_config, adapter_name), model):
            method(self, model, peft_config, adapter_name, *args, **kwargs)

    return init


def _method(config: Any, adapter: str) -> str:
    """Returns what messages call an adapter's method, LORA say."""
    config = config.get(adapter) if isinstance(config, dict) else config
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind or "PEFT"))


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """Guards the one way by which adapters come to be around layers; a refusal undoes it."""

    @wraps(method)
    def guarded(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_parameters(self.peft_config[adapter_name], model)
        if not any(isinstance(one, QuantizedModule) for one in model.modules()):
            method(self, model, adapter_name, *args, **kwargs)
            return
        op = _method(self.peft_config, adapter_name)
        tree = {module: dict(module._modules) for module in model.modules()}
        trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        create, targets = self._create_and_replace, []

        def create_and_replace(*given: Any, **named: Any) -> None:
            bound = {**dict(zip(_CREATE, given, strict=False)), **named}
            target = bound["target"]
            name = plain(bound.get("current_key") or bound["target_name"])
            check_adapter(given[0] if given else None, target, name)
            if bound.get("parameter_name") and is_packed(base_of(target)):
                raise refusal(op, name, base_of(target), "have float Parameters to be adapted")
            if isinstance(base_of(target), QuantizedModule):
                targets.append((name, base_of(target), bound["parent"], bound["target_name"]))
            with unwritten(op, name, base_of(target)):
                create(*given, **named)

        # Every tuner has its own: the instance's attribute hides the class's.
        self._create_and_replace = create_and_replace
        try:
            with sealed(op, model), _named(model):
                method(self, model, adapter_name, *args, **kwargs)
                tried: set[tuple[type, str, bool]] = set()
                for name, base, parent, child in targets:
                    module = getattr(parent, child)
                    kind = (type(module), type(base).__name__, is_packed(base))
                    if kind not in tried and hasattr(module, "_active_adapter"):
                        tried.add(kind)
                        try_adapter(op, name, module, adapter_name)
        except Exception as error:
            told = _told(op, error, targets)
            if told is None:
                raise
            for module, children in tree.items():
                module._modules = children
            for parameter, value in trains:
                parameter.requires_grad_(value)
            if told is error:
                raise
            raise told from error
        finally:
            del self._create_and_replace

    return guarded


def _told(op: str, error: Exception, targets: list[Any]) -> LifecycleError | None:
    """Returns what to raise for an error of PEFT: None where ours is not the layer at fault."""
    if isinstance(error, LifecycleError):
        return error
    for name, base, *_ in reversed(targets):
        # "Target module X is not supported", or torch's refusal to train a copy of the codes.
        if type(base).__name__ in str(error) or "can require gradients" in str(error):
            return refusal(op, name, base, "be a float layer for this adapter")
    return None


def _prompting(method: Callable[..., None]) -> Callable[..., None]:
    """Shows a quantized embedding where PEFT looks for one: it knows them by a float Parameter."""

    @wraps(method)
    def shown(self: Any, adapter_name: str) -> None:
        finder = getattr(self.base_model, "get_input_embeddings", None)
        embedding = finder() if finder else None
        if not isinstance(embedding, QuantizedEmbedding) or hasattr(self.base_model, "embeddings"):
            method(self, adapter_name)
            return
        holder = nn.Module()
        holder.word_embeddings = embedding
        self.base_model.embeddings = holder
        try:
            method(self, adapter_name)
        finally:
            del self.base_model.embeddings

    return shown
