"""How a configuration quantizes each linear layer, and what of it speaks of none."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from bitcore.config import BitQuantConfig
from bitcore.errors import BitLabError, ConfigError
from bitcore.estimators import get_estimator
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import names_for_overrides
from bitlab_hf.model.marks import tied_groups
from bitlab_hf.model.tree import Found, aliases_of

logger = logging.getLogger("bitlab")


class Naming:
    """Adds the module's name to an error of its construction."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, BitLabError):
            raise ConfigError(f"{self._name}: {error}") from error


def check_overrides(
    model: nn.Module,
    linears: list[Found[nn.Linear]],
    config: BitLabConfig,
    experts: Sequence[Found[nn.Module]],
) -> None:
    """Raises if an override's pattern names no layer, and no experts, that are converted.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    names = [
        alias for found in linears for name in found.names for alias in aliases_of(model, name)
    ]
    if config.sub_norm and not any(map(config.norms, names)):
        raise ConfigError(
            f"BitLabConfig: sub_norm must match converted layers, got {config.sub_norm!r}, which "
            "match none"
        )
    names += names_for_overrides(model, experts)
    for pattern in config.overrides:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"BitLabConfig: overrides must match converted layers, got {pattern!r}, which "
                f"matches none\nPatterns match whole names such as {names[0]!r}; "
                f"try '*{pattern}'."
            )


def check_names(model: nn.Module, linears: list[Found[nn.Linear]], config: BitLabConfig) -> None:
    """Raises if a configuration speaks of a layer by a name that is not its first, which decides.

    For what users give: in files such words have never meant anything.

    Raises:
        ConfigError: Overrides, or ``sub_norm``, ask something of a later name alone.
    """
    for found in linears:
        first = aliases_of(model, found.names[0])
        kept = config.layer_name(*first), config.layer_config(*first)
        for name in found.names[1:]:
            names = [*first, *aliases_of(model, name)]
            if (config.layer_name(*names), config.layer_config(*names)) != kept:
                raise ConfigError(
                    "BitLabConfig: overrides and sub_norm must call a layer by its first name, got "
                    f"{name!r} for {found.names[0]!r}\nUse the first name, or a pattern that "
                    "matches it too."
                )


def layer_schemes(
    model: nn.Module, linears: list[Found[nn.Linear]], config: BitLabConfig
) -> list[BitQuantConfig]:
    """Returns how these layers are quantized while they are latent: those that get one weight only
    once it is loaded by absmean, where the estimator would train a scale for each.
    """
    groups = tied_groups(model, linears)
    apart = [group for group in groups if len({id(one.module.weight) for one in group}) > 1]
    tied = {id(one.module) for group in apart for one in group}
    schemes, changed = [], []
    for found in linears:
        with Naming(found.names[0]):
            scheme = config.layer_config(*aliases_of(model, found.names[0]))
        if id(found.module) in tied and get_estimator(scheme.weight_quantizer).learned:
            changed.append(found.names[0])
            scheme = replace(scheme, weight_quantizer="absmean")
        schemes.append(scheme)
    if changed:
        logger.info(
            "bitlab: %d layers such as %s get the scales of absmean: a scale is trained for layers "
            "that are tied to none",
            len(changed),
            changed[0],
        )
    return schemes
