"""The life of a quantized layer: train, eval, deploy; state dict and cache.

LATENT: ``weight`` is a float Parameter, in training the straight-through forward reads it, in eval
mode packed weights derived from it are used. They are a cache, never part of the state dict, so
that a latent layer saves and loads exactly like the float layer it came from. ``deploy()``, one
way, makes it DEPLOYED: ``qweight``, ``qweight_scale`` and with groups ``qweight_multiplier`` are
the state, ``weight`` is a view.
``__getattr__`` serves ``qweight`` in eval mode: a property would hide the deployed Parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError
from bitcore.estimators import check_scales
from bitcore.prepared import PreparedLinear
from bitlayers.checks import check_deployable, check_sizes, load_problem, log_deployed_stays
from bitlayers.deployment import Deployment, Registered
from bitlayers.init import INIT_METHODS
from bitlayers.quantized import cast_dtype
from bitlayers.state import SCALES, LayerState, Packed
from bitlayers.training import (
    Fingerprint,
    is_decoding,
    latent_tensors,
    make_learned_scale,
    pack,
    reset_learned_scale,
)

_PACKED = ("qweight", *SCALES)


class BitLayerBase(LayerState):
    """Base class of all quantized layers.

    A subclass writes the five methods that raise NotImplementedError here; the base owns
    construction, the packed skeleton for loading, the state dict and the cache. It cooperates with
    ``nn.Linear``: a class that inherits from both passes for a linear layer wherever one is looked
    for.

    Args:
        in_features: K; None for a subclass that makes its own parameters.
        out_features: N.
        bias: Whether the layer has a bias.
        init_method: ``"xavier_uniform"`` or ``"kaiming_uniform"``.
        quant_config: How the layer is quantized; default `BitQuantConfig()`.
        device: Where the parameters are made.
        dtype: Their dtype.

    Attributes:
        quant_config: The configuration.
        latent_dtype: dtype of the latent weight, remembered after `deploy`.
        learned_scale: float32 Parameter where the estimator trains its scale, else None.
        quant_strength: How far the training forward is quantized; see `set_quant_strength`.

    Raises:
        ArgumentError: A size or init_method is not allowed.
        ArgumentTypeError: quant_config is not a BitQuantConfig.
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        init_method: str = "xavier_uniform",
        quant_config: BitQuantConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(self) is BitLayerBase:
            raise ArgumentTypeError(
                "BitLayerBase: the class must be subclassed, got an instance of it"
            )
        config = BitQuantConfig() if quant_config is None else quant_config
        name = type(self).__name__
        if not isinstance(config, BitQuantConfig):
            raise ArgumentTypeError(
                f"{name}: quant_config must be a BitQuantConfig, got {config!r}"
            )
        if init_method not in INIT_METHODS:
            raise ArgumentError(
                f"{name}: init_method must be one of {sorted(INIT_METHODS)}, got {init_method!r}"
            )
        self.quant_config = config
        # For torch.compile, which skips a module's own fields but checks an object's at each call.
        self._activation = config.activation
        self.init_method = init_method
        self.latent_dtype = self.float_dtype = dtype or torch.get_default_dtype()
        self._is_deployed = False
        self._cache: tuple[Fingerprint, Packed] | None = None
        self._prepared: PreparedLinear | None = None
        if in_features is None or out_features is None:
            super().__init__()
            self.register_parameter("learned_scale", None)
            return
        check_sizes(name, in_features, out_features, config)
        if isinstance(self, nn.Linear):
            super().__init__(in_features, out_features, bias, device, dtype)
        else:
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight = nn.Parameter(
                torch.empty(out_features, in_features, device=device, dtype=dtype)
            )
            self.bias = None
            if bias:
                self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
            self.reset_parameters()
        make_learned_scale(self)

    # What a subclass writes.

    def _train_forward(self, x: Tensor) -> Tensor:
        """The forward in training: latent weights, gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define _train_forward(x)")

    def _eval_forward(self, x: Tensor) -> Tensor:
        """The forward in eval mode and after deployment: packed weights."""
        raise NotImplementedError(f"{type(self).__name__} must define _eval_forward(x)")

    def _on_enter_training_mode(self) -> None:
        """Called when the layer goes from eval to training."""
        raise NotImplementedError(f"{type(self).__name__} must define _on_enter_training_mode()")

    def _on_enter_eval_mode(self) -> None:
        """Called when the layer goes from training to eval."""
        raise NotImplementedError(f"{type(self).__name__} must define _on_enter_eval_mode()")

    def _perform_deployment(self) -> Packed | None:
        """Returns ``(qweight, qweight_scale)``, with scales of groups in two levels also
        ``qweight_multiplier``, which the base commits; or packs the layer itself,
        registers what its ``_eval_forward`` needs, and returns nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define _perform_deployment()")

    # Not an ABC: a subclass may leave methods out, and is told so when they are called.
    for _method in (
        _train_forward,
        _eval_forward,
        _on_enter_training_mode,
        _on_enter_eval_mode,
        _perform_deployment,
    ):
        vars(_method)["__isabstractmethod__"] = True
    del _method

    # State.

    def reset_parameters(self) -> None:
        """Initializes the weight by ``init_method`` and the bias to zero, unless both are meta."""
        if self.weight.is_meta:
            return
        if self.weight.numel():
            INIT_METHODS[self.init_method](self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., in_features]; returns [..., out_features]."""
        if self.casts_input:
            x = x.to(self.float_dtype)
        if self.training:
            return self._train_forward(x)
        if not self._is_deployed and not is_decoding(x):
            self.invalidate_cache()
        return self._eval_forward(x)

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval mode; a deployed layer stays in eval mode and says so once.

        Raises:
            ArgumentTypeError: mode is not a bool.
        """
        if not isinstance(mode, bool):
            raise ArgumentTypeError(f"train: mode must be a bool, got {mode!r}")
        if self._is_deployed:
            if mode:
                log_deployed_stays()
            return super().train(False)
        before = self.training
        self.invalidate_cache()
        super().train(mode)
        if before != mode:
            self._on_enter_training_mode() if mode else self._on_enter_eval_mode()
        return self

    def invalidate_cache(self) -> None:
        """Drops the packed weights of eval mode; see `bitlayers.training.Fingerprint`."""
        self._cache = self._prepared = None

    def packed(self) -> Packed:
        """Returns ``(qweight, qweight_scale)``, with scales of groups in two levels also
        ``qweight_multiplier``: the deployed state, else the eval cache.
        """
        if self.packs_itself:
            return self.qweight, self.qweight_scale
        if self._is_deployed:
            # Not by attribute: nn.Module's look-up costs as much as a small layer.
            packed = self._parameters["qweight"], self._buffers["qweight_scale"]
            multiplier = self._buffers.get("qweight_multiplier")
            return cast(Packed, packed if multiplier is None else (*packed, multiplier))
        tensors = latent_tensors(self)
        if tensors is None:
            return self._pack()
        cache = self._cache
        if cache is not None and cache[0].matches(tensors):
            return cache[1]
        # A cache made under inference_mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            made = self._pack()
            self._cache = (Fingerprint(tensors), made)
        return made

    def _pack(self) -> Packed:
        return pack(self)

    def __getattr__(self, name: str) -> Any:
        serves = name in _PACKED and not self.__dict__.get("_is_deployed", True)
        if serves and not self.__dict__.get("_registers", False):
            if self.training:
                raise AttributeError(
                    f"{type(self).__name__} has no {name} in training mode; call eval() or deploy()"
                )
            if self._parameters.get("weight") is not None and name in self.packed_tensors():
                return self.packed()[_PACKED.index(name)]
        return super().__getattr__(name)

    # Deployment.

    def deploy(self) -> Self:
        """Packs the weights for good: the latent weight is dropped and nothing trains any more.

        Raises:
            LifecycleError: See `bitlayers.checks.check_deployable`.
            NonFiniteError: The weight holds NaN or infinity; nothing is changed.
            ArgumentError: See `build_deployment`; nothing is changed.
        """
        check_deployable(self, "weight")
        self.commit(self.build_deployment())
        return self

    def build_deployment(self, name: str = "") -> Deployment:
        """Returns what `_perform_deployment` makes of the layer, which stays as it is.

        Args:
            name: What messages call the layer.

        Raises:
            LifecycleError: It returned anything but two or three tensors or None.
            ArgumentError: The estimator gave a scale that is not finite and positive.
        """
        before = Registered.of(self)
        try:
            packed = self._perform_deployment()
            after = Registered.of(self)
        finally:
            before.restore(self)
        if packed is None:
            return after
        if not (isinstance(packed, tuple) and len(packed) in (2, 3)):
            raise LifecycleError(
                f"{type(self).__name__}: _perform_deployment must return (qweight, qweight_scale), "
                "with multipliers these too, or nothing once the layer has packed itself, "
                f"got {packed!r}"
            )
        weight = self._parameters.get("weight")
        check_scales(packed[1], weight, self.quant_config.weight_quantizer, name or repr(self))
        return packed

    def commit(self, built: Deployment) -> None:
        """Makes the layer deployed with what `build_deployment` returned."""
        if isinstance(built, tuple):
            self.commit_packed(*built)
            return
        built.restore(self)
        self.invalidate_cache()
        self.packs_itself = self._is_deployed = True
        super().train(False)

    def commit_packed(
        self, qweight: Tensor, qweight_scale: Tensor, qweight_multiplier: Tensor | None = None
    ) -> None:
        """Makes the layer deployed with these packed tensors, which it keeps.

        Args:
            qweight: uint8 [ceil(N / 4), K].
            qweight_scale: float32 [1], [N] or [N, K / G].
            qweight_multiplier: uint8 [N, K / G] beside a scale [N], or None.
        """
        weight = self._parameters.get("weight")
        if weight is not None:
            self.latent_dtype = weight.dtype
        self.invalidate_cache()
        # Not `del`: `weight` is a view from here on.
        self.register_parameter("weight", None)
        self.register_parameter("learned_scale", None)
        self.register_parameter("qweight", nn.Parameter(qweight, requires_grad=False))
        self.register_buffer("qweight_scale", qweight_scale)
        if qweight_multiplier is not None:
            self.register_buffer("qweight_multiplier", qweight_multiplier)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._is_deployed = True
        super().train(False)

    # Construction from others.

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant_config: BitQuantConfig | None = None) -> Self:
        """Returns a latent layer that shares the weight and bias of a linear layer.

        Raises:
            ArgumentTypeError: linear is not an ``nn.Linear``, or is quantized already.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, BitLayerBase):
            raise ArgumentTypeError(
                f"{cls.__name__}.from_linear: linear must be a plain nn.Linear, "
                f"got {type(linear).__name__}"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_config=quant_config,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        make_learned_scale(layer)
        return layer.train(linear.training)

    @classmethod
    def packed_skeleton(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        quant_config: BitQuantConfig | None = None,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a deployed layer with empty packed tensors, for a loader to fill."""
        layer = cls(
            in_features, out_features, bias, quant_config=quant_config, device="meta", dtype=dtype
        )
        kinds = layer.packed_tensors().values()
        made = (torch.empty(shape, dtype=kind, device=device) for kind, shape in kinds)
        layer.commit_packed(*made)
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(layer.bias, device=device), False)
        return layer

    # State dict, moves, copies.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.invalidate_cache()
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        if weight is not None:
            self.latent_dtype = weight.dtype
        self.float_dtype = cast_dtype(fn, self.float_dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.invalidate_cache()
        problem = load_problem(self, state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.learned_scale is not None and prefix + "learned_scale" in missing_keys:
            # A float checkpoint: the scale starts from the weight that has just been loaded.
            missing_keys.remove(prefix + "learned_scale")
            reset_learned_scale(self)
        if self._is_deployed and prefix + "weight" in unexpected_keys:
            # The empty tensor that makes a deployed file fail to load without BitLab.
            unexpected_keys.remove(prefix + "weight")

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: everything but the cache."""
        return {**self.__dict__, "_cache": None, "_prepared": None}
