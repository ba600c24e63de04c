"""What a checkpoint's ``quantization_config`` says, and what of it can be served.

Read here anew, and not by `bitlab_hf`, which needs a newer transformers than vLLM allows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bitcore.config import BitQuantConfig
from bitcore.errors import ConfigError

METHOD = "bitlab"
# How a layer is held that is not ternary; of one that is, its configuration says how.
INT8, FLOAT = "int8", "float"
Form = BitQuantConfig | str
# The highest that is read.
FORMAT_VERSION = 4
_EXPERTS = (None, "keep", "ternary")
_HEADS = ("keep", "int8", "ternary")
_EMBEDDINGS = ("keep", "ternary")
_LAYERS = ("BitLinear", "RMSNormBitLinear")
# How packed weights came about says nothing of how they are multiplied, and may name an estimator
# that is not registered here.
_LAYER_FIELDS = {field.name for field in fields(BitQuantConfig)} - {"weight_quantizer"}
_KNOWN = _LAYER_FIELDS | {
    "embedding",
    "experts",
    "format_version",
    "head",
    "int8_layers",
    "latent_dtype",
    "layer",
    "mode",
    "modules_to_not_convert",
    "overrides",
    "quant_method",
    "sub_norm",
    "verify",
    "weight_format",
    "weight_quantizer",
}
_LATENT = "Pack it first: `bitlab deploy FOLDER PACKED`, and serve PACKED."
_PER_TENSOR = (
    "One scale for all tokens makes answers depend on what else is served with them; train or "
    "deploy with activation_granularity='per_token'."
)


@dataclass(frozen=True)
class Scheme:
    """The ``quantization_config`` of a deployed checkpoint, checked.

    Attributes:
        base: The fields of BitQuantConfig that hold for every layer.
        overrides: Other values of them by glob patterns of names; later ones win.
        sub_norm: Glob patterns of layers with an RMS norm of their input.
        head: ``"keep"``, ``"int8"`` or ``"ternary"``.
        embedding: ``"keep"`` or ``"ternary"``.
        version: The format's version; in the first, groups have float32 scales.
    """

    base: Mapping[str, Any]
    overrides: Mapping[str, Mapping[str, Any]]
    sub_norm: tuple[str, ...]
    head: str
    embedding: str
    version: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Scheme:
        """Checks and returns what a file holds.

        Raises:
            ConfigError: The file is of a newer BitLab, holds latent weights, has a field that is
                not known or a value that is not allowed, or cannot be served.
        """
        version = config.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ConfigError(
                f"bitlab: format_version must be an int of at least 1, got {version!r}"
            )
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"bitlab: format_version must be at most {FORMAT_VERSION} to be served, got "
                f"{version}: the checkpoint was written by a newer BitLab\n"
                "Update BitLab's clone; in it, run `pip install ./packages/vllm` with vLLM's pip."
            )
        _check("quant_method", config.get("quant_method"), (METHOD,))
        _check("weight_format", config.get("weight_format"), ("packed",), _LATENT)
        unknown = sorted(set(config) - _KNOWN)
        if unknown:
            raise ConfigError(
                f"bitlab: fields must be among {sorted(_KNOWN)}, "
                f"got {', '.join(map(repr, unknown))}"
            )
        _check(
            "layer",
            config.get("layer", "BitLinear"),
            _LAYERS,
            "vLLM runs no layers of your own: `bitlab serve FOLDER --with-transformers`.",
        )
        _check("experts", config.get("experts"), _EXPERTS)
        head, embedding = config.get("head", "keep"), config.get("embedding", "keep")
        _check("head", head, _HEADS)
        _check("embedding", embedding, _EMBEDDINGS)
        overrides = config.get("overrides") or {}
        if not isinstance(overrides, Mapping) or not all(
            isinstance(values, Mapping) for values in overrides.values()
        ):
            raise ConfigError(
                f"bitlab: overrides must be {{pattern: {{field: value}}}}, got {overrides!r:.80}"
            )
        norms = config.get("sub_norm") or []
        if not isinstance(norms, list) or not all(isinstance(one, str) for one in norms):
            raise ConfigError(f"bitlab: sub_norm must be a list of names, got {norms!r:.80}")
        base = {name: config[name] for name in _LAYER_FIELDS if name in config}
        scheme = cls(base, overrides, tuple(norms), head, embedding, version)
        for values in ({}, *overrides.values()):
            scheme._config("quantization_config", {**base, **values})
        return scheme

    def layer_config(self, *names: str) -> BitQuantConfig:
        """Returns how a layer is quantized, by the checkpoint's name of it; of experts, by those of
        their module and of the tensor.

        Raises:
            ConfigError: It cannot be served.
        """
        values = dict(self.base)
        for pattern, override in self.overrides.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                values.update(override)
        return self._config(names[-1], values)

    def _config(self, name: str, values: dict[str, Any]) -> BitQuantConfig:
        values = {field: value for field, value in values.items() if field != "weight_quantizer"}
        if values.get("weight_granularity") != "per_group":
            values["group_scale_dtype"] = None
        elif self.version == 1:
            values["group_scale_dtype"] = "float32"
        config = BitQuantConfig.from_dict(values)
        if config.activation == "int8_per_tensor":
            raise ConfigError(
                f"bitlab: activation_granularity of {name} must be 'per_token' to be served, "
                f"got 'per_tensor'\n{_PER_TENSOR}"
            )
        return config

    def norms(self, name: str) -> bool:
        """Tells whether a layer has an RMS norm of its input."""
        ends = (name, name.rpartition(".")[2])
        return any(fnmatch.fnmatchcase(end, p) for p in self.sub_norm for end in ends)


def _check(field: str, value: object, allowed: tuple[str | None, ...], fix: str = "") -> None:
    if value not in allowed:
        wanted = repr(allowed[0]) if len(allowed) == 1 else f"one of {allowed}"
        raise ConfigError(
            f"bitlab: {field} must be {wanted} to be served, got {value!r}"
            + (f"\n{fix}" if fix else "")
        )
