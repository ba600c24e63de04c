"""The options that say how a float model is made ternary, the same for every command."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError, ConfigError
from bitlab_hf.cli.loading import load_model, load_skeleton

# The fields of BitLabConfig, each with its type, the names of its option and what it means.
OPTIONS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "weight_granularity": (
        str,
        ("--weight-granularity", "--weight"),
        "Scales of the weights: per_tensor, per_channel or per_group.",
    ),
    "group_size": (int, ("--group-size",), "64 or 128, with per_group."),
    "group_scale_dtype": (
        str,
        ("--group-scale-dtype",),
        "Scales of groups: uint8 (multipliers of one scale a row; the default) or float32.",
    ),
    "activation_dtype": (str, ("--activation-dtype", "--activation"), "int8 or float32."),
    "activation_granularity": (
        str,
        ("--activation-granularity",),
        "Scales of the activations: per_token or per_tensor.",
    ),
    "weight_quantizer": (
        str,
        ("--weight-quantizer", "--estimator"),
        "Estimator of the scales: absmean, absmax, twn or lsq.",
    ),
    "layer": (str, ("--layer",), "The registered layer that replaces nn.Linear."),
    "head": (str, ("--head",), "The output head: keep, int8 or ternary."),
    "int8_layers": (
        list[str],
        ("--int8-layers",),
        "Linear layers that become int8 instead of ternary; repeatable.",
    ),
    "sub_norm": (list[str], ("--sub-norm",), "Layers that get a norm of their input; repeatable."),
    "modules_to_not_convert": (
        list[str],
        ("--modules-to-not-convert",),
        "Layers to leave float; repeatable.",
    ),
}
# Those that hold patterns of names.
_PATTERNS = ("modules_to_not_convert", "int8_layers")


def with_scheme(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a scheme.

    Args:
        command: Takes ``scheme``, a dict of the fields of BitLabConfig that were given.

    Returns:
        The command as typer sees it.
    """
    own = inspect.signature(command, eval_str=True)
    others = [one for one in own.parameters.values() if one.name != "scheme"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None,
                typer.Option(*flags, help=text, rich_help_panel="Scheme of a float model"),
            ],
        )
        for name, (kind, flags, text) in OPTIONS.items()
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        scheme = {name: given.pop(name) for name in OPTIONS}
        # A repeatable option that was not given is an empty list.
        kept = {name: value for name, value in scheme.items() if value not in (None, [])}
        command(**given, scheme=kept)

    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others), *added]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def config_of(op: str, scheme: dict[str, Any], held: dict[str, Any] | None, **loading: Any) -> Any:
    """Returns the configuration that a model is loaded with.

    Args:
        op: The command, for error messages.
        scheme: The fields that were given.
        held: The model's own quantization_config; None of a float model.
        loading: Options of this load, see `BitLabConfig`.

    Raises:
        ConfigError: A field has a value that is not allowed, or they do not go together.
        ArgumentError: The model has a scheme already, and another one was given.
    """
    from bitlab_hf import BitLabConfig
    from bitlayers.registry import get_layer

    for field in _PATTERNS:
        for pattern in scheme.get(field, ()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{op}: {OPTIONS[field][1][0]} must be names or regular expressions, got "
                    f"{pattern!r} ({error})"
                ) from error
    if held is None:
        _check_groups(op, scheme)
        config = BitLabConfig(**scheme, **loading)
        get_layer(config.layer)
        return config
    check_same(op, scheme, held)
    return BitLabConfig(**loading)


def _check_groups(op: str, scheme: dict[str, Any]) -> None:
    """Refuses options of groups where there are none, and groups of no size.

    Raises:
        ConfigError: The message names the options.
    """
    from bitcore.checks import GROUP_SIZES

    grouped = scheme.get("weight_granularity") == "per_group"
    for name in ("group_size", "group_scale_dtype"):
        if scheme.get(name) is not None and not grouped:
            raise ConfigError(
                f"{op}: {OPTIONS[name][1][0]} must be left out unless --weight-granularity is "
                f"per_group, got {scheme[name]!r}\n"
                "Pass --weight-granularity per_group to use groups."
            )
    if grouped and scheme.get("group_size") is None:
        raise ConfigError(
            f"{op}: --group-size must be one of {GROUP_SIZES} with --weight-granularity per_group, "
            "got none"
        )


def pretrained_config(
    op: str, scheme: dict[str, Any], held: dict[str, Any] | None, folder: str | None = None
) -> Any:
    """Returns the configuration that a pretrained model is trained with: `config_of`, with what
    `bitlab_hf.pretrained_config` picks where nothing else was asked for.

    Args:
        op: The command, for error messages.
        scheme: The fields that were given.
        held: The model's own quantization_config; None of a float model.
        folder: The model; None to check what was given before it is at hand.

    Raises:
        ConfigError, ArgumentError: See `config_of`.
        CheckpointError: config.json makes no model.
    """
    from bitcore.checks import GROUP_SIZES
    from bitlab_hf.model import groups

    grouped = held is None and scheme.get("weight_granularity", "per_group") == "per_group"
    assumed = {**groups.PICKED, "group_size": GROUP_SIZES[0], **scheme} if grouped else scheme
    config = config_of(op, assumed, held)
    if not grouped or folder is None or "group_size" in scheme:
        return config
    config = groups.pretrained_config(load_skeleton(folder), **scheme)
    picked = {name: getattr(config, name) for name in ("weight_granularity", "group_size")}
    _check_groups(op, {**scheme, **picked})
    return config


def check_same(op: str, scheme: dict[str, Any], held: dict[str, Any]) -> None:
    """Checks that a scheme is the one that a model has.

    Raises:
        ArgumentError: A field that was given is another one, or the model is not BitLab's.
    """
    from bitlab_hf import BitLabConfig

    ending = "\nThe scheme was fixed when the model was made."
    if scheme and held.get("quant_method") != "bitlab":
        raise ArgumentError(
            f"{op}: {', '.join(scheme)} must be left out for a model that has a scheme, got one of "
            f"the method {held.get('quant_method')!r}{ending}"
        )
    theirs: Any = BitLabConfig.from_dict(held) if scheme else None
    for name, asked in scheme.items():
        has = getattr(theirs, name)
        # A file lists all that were left alone, not only what was asked for.
        if name == "modules_to_not_convert" and set(asked) <= set(has or ()):
            continue
        if name == "int8_layers" and _name(asked, has):
            continue
        # Two names of one thing.
        if name == "activation_granularity" and {asked, has} == {"per_token", "per_channel"}:
            continue
        if asked != has:
            raise ArgumentError(
                f"{op}: {name} must be left out for a model that has a scheme, or be its own "
                f"{has!r}, got {asked!r}{ending}"
            )


def _name(patterns: list[str], names: list[str]) -> bool:
    """Tells whether patterns name these modules, each of them one at least."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not any(should_convert_module(name, patterns) for name in names) and all(
        any(not should_convert_module(name, [pattern]) for name in names) for pattern in patterns
    )


def load_packed(op: str, source: str, scheme: dict[str, Any], held: dict[str, Any] | None) -> Any:
    """Loads a float or latent model packed.

    Args:
        op: The command, for error messages.
        source: A folder or a name of the hub.
        scheme: The fields that were given.
        held: The model's own quantization_config; None of a float model.

    Raises:
        ConfigError, ArgumentError, CheckpointError: See `config_of` and `load_model`.
    """
    from bitlab_hf import deploy

    if held is None and scheme.get("head") == "ternary":
        # A head that is tied to the embedding has to be untied before it is packed.
        latent = config_of(op, {**scheme, "latent_dtype": "keep"}, None)
        return deploy(load_model(source, quantization_config=latent))
    return load_model(source, quantization_config=config_of(op, scheme, held, mode="infer"))
