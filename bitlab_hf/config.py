"""BitLabConfig: what transformers' ``quantization_config`` holds, in memory and in config.json."""

from __future__ import annotations

import copy
import fnmatch
import re
from dataclasses import fields
from itertools import product
from typing import Any, cast

from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from bitcore.config import BitQuantConfig
from bitcore.errors import ConfigError

# The highest that is read: that of files with a ternary embedding, or int8 layers. Those with
# ternary experts are of version 3, those with groups in two levels of version 2, all others of
# version 1, in which groups have float32 scales.
FORMAT_VERSION = 4
QUANT_METHOD = "bitlab"
_CHOICES = {
    "weight_format": ("latent", "packed"),
    "head": ("keep", "int8", "ternary"),
    "embedding": ("keep", "ternary"),
    "experts": (None, "keep", "ternary"),
    "mode": ("auto", "train", "infer"),
    "latent_dtype": ("float32", "keep"),
    "verify": (True, False),
    "group_scale_dtype": ("uint8", "float32"),
}
# Given at load only; never written.
LOADING_ATTRIBUTES = ("mode", "latent_dtype", "verify")
_LAYER_FIELDS = tuple(field.name for field in fields(BitQuantConfig))


class BitLabConfig(QuantizationConfigMixin):
    """How a model is made ternary.

    One scale a matrix, the default, is right for what is trained ternary from the start, and what
    files of transformers' own ``bitnet`` method hold; a weight takes 2 bits. A pretrained model
    keeps far more of what it knows with ``weight_granularity="per_group"``, which
    `bitlab_hf.pretrained_config` picks for it: with groups of G, and K inputs, a weight takes
    2 + 8/G + 32/K bits, 2.13 to 2.2 at ``group_size=64``.

    Args:
        layer: The registered layer that replaces ``nn.Linear``.
        modules_to_not_convert: Names, or patterns as transformers takes them, of further modules
            to leave alone; transformers' own defaults and the output head always are.
        overrides: ``{pattern: {field: value}}``: for modules whose name matches the glob pattern,
            other values of the quantization fields; later patterns win. Of a linear layer that
            stands under several names the first counts, here and in ``sub_norm``.
        head: ``"keep"`` leaves the output head alone. ``"int8"`` stores it, and the embedding tied
            to it, in int8 with a scale per row, from `deploy` or ``mode="infer"`` on; a latent
            model keeps it float. ``"ternary"`` converts it like the other layers.
        embedding: ``"ternary"`` is written where a deployed file holds the input embedding packed,
            because it was ternary already; a head that is tied to it is ternary then, too. Not for
            the user to set: no embedding is made ternary.
        int8_layers: Names, or patterns as ``modules_to_not_convert`` takes them, of linear layers
            that become int8 with a scale per row where the head would; latent they are plain and
            float. For the few layers that lose most. A file has the whole names of those that it
            holds so.
        experts: ``None`` converts experts that a model keeps as tensors, where it is known how
            these lie; ``"ternary"`` insists on it; ``"keep"`` leaves them float. A file says
            ``"ternary"`` where its experts are.
        sub_norm: Glob patterns of modules, by their whole or their last name (``["o_proj",
            "down_proj"]``), that get an RMS norm of their input, as BitNet does
            (arXiv 2402.17764); its weights start at one.
        activation_dtype, activation_granularity, weight_granularity, group_size, weight_quantizer:
            See `bitcore.BitQuantConfig`. Where the estimator trains a scale, layers and experts
            that the model ties to others of their kind get ``"absmean"``: they have one weight, and
            a file can say nothing of a scale for each.
        group_scale_dtype: How layers with groups keep their scales, wherever groups come from:
            ``"uint8"`` (the default) is a float32 scale a row and an integer from 1 to 127 a group.
            ``"float32"`` is a float a group, several times slower: for what was trained or exported
            so, and for readers older than format version 2.
        mode: ``"auto"`` takes what the file holds: latent weights for training from a float or
            latent file, packed ones from a deployed file. ``"train"`` insists on latent weights,
            ``"infer"`` packs a float or latent file while it loads.
        latent_dtype: ``"float32"`` (small updates vanish in 16 bits), or ``"keep"`` for the
            model's dtype.
        verify: Whether to scan a deployed file for damage while loading; reads every weight once.
        weight_format, format_version, quant_method: Written by BitLab; not for the user to set.
            In version 1 groups have float32 scales.

    Raises:
        ConfigError: A field is unknown or its value is not allowed (the message lists those that
            are), the file was written by a newer BitLab, or it is of version 1 with a field of
            version 2.
    """

    def __init__(
        self,
        layer: str = "BitLinear",
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        head: str = "keep",
        embedding: str = "keep",
        int8_layers: list[str] | None = None,
        experts: str | None = None,
        sub_norm: list[str] | None = None,
        activation_dtype: str = "int8",
        activation_granularity: str = "per_token",
        weight_granularity: str = "per_tensor",
        group_size: int | None = None,
        group_scale_dtype: str | None = None,
        weight_quantizer: str = "absmean",
        mode: str = "auto",
        latent_dtype: str = "float32",
        verify: bool = True,
        weight_format: str = "latent",
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(format_version, int) or isinstance(format_version, bool):
            raise ConfigError(
                f"BitLabConfig: format_version must be an int, got {format_version!r}"
            )
        if format_version > FORMAT_VERSION:
            raise ConfigError(
                f"BitLabConfig: format_version must be at most {FORMAT_VERSION}, "
                f"got {format_version}: the checkpoint was written by a newer BitLab\n"
                "Update BitLab's clone, and run `pip install .` in it."
            )
        if format_version < 1:
            raise ConfigError(
                f"BitLabConfig: format_version must be at least 1, got {format_version}"
            )
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"BitLabConfig: quant_method must be 'bitlab', got {quant_method!r}")
        if unknown:
            raise ConfigError(
                f"BitLabConfig: fields must be among {sorted(_KNOWN_FIELDS)}, "
                f"got {', '.join(map(repr, sorted(unknown)))}"
            )
        given = {
            "weight_format": weight_format,
            "head": head,
            "embedding": embedding,
            "experts": experts,
            "mode": mode,
            "latent_dtype": latent_dtype,
            "verify": verify,
        }
        for name, value in given.items():
            _check_choice(name, value)
        if not isinstance(layer, str):
            raise ConfigError(f"BitLabConfig: layer must be a registered name, got {layer!r}")
        # transformers types the methods it knows as an enumeration; a plain string works
        # everywhere.
        self.quant_method = cast(QuantizationMethod, QUANT_METHOD)
        self.weight_format = weight_format
        self.layer = layer
        self.modules_to_not_convert = checked_patterns(
            "modules_to_not_convert", modules_to_not_convert
        )
        self.sub_norm = checked_names("sub_norm", sub_norm) or []
        if self.sub_norm and layer not in ("BitLinear", "RMSNormBitLinear"):
            raise ConfigError(
                f"BitLabConfig: layer must be 'BitLinear' with sub_norm, got {layer!r}"
            )
        self.head = head
        self.embedding = self._checked_embedding(embedding)
        self.int8_layers = checked_patterns("int8_layers", int8_layers) or []
        self.experts = experts
        self.mode = mode
        self.latent_dtype = latent_dtype
        self.verify = verify
        base = BitQuantConfig(
            activation_dtype=activation_dtype,
            activation_granularity=activation_granularity,
            weight_granularity=weight_granularity,
            group_size=group_size,
            weight_quantizer=weight_quantizer,
        )
        self.activation_dtype = base.activation_dtype
        self.activation_granularity = base.activation_granularity
        self.weight_granularity = base.weight_granularity
        self.group_size = base.group_size
        self.weight_quantizer = base.weight_quantizer
        self.group_scale_dtype = "uint8"
        if group_scale_dtype is not None:
            _check_choice("group_scale_dtype", group_scale_dtype)
            self.group_scale_dtype = group_scale_dtype
        self.overrides = self._checked_overrides(overrides)
        if format_version == 1:
            self._check_first_version(group_scale_dtype)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Returns what a file or a dict holds. How a file is loaded, and whether it is verified, it
        does not decide: such fields of a file are not read.
        """
        if "format_version" in config_dict or config_dict.get("weight_format") == "packed":
            # A file's: BitLab writes the first into each; no packed one is read without the other.
            config_dict = {
                name: held for name, held in config_dict.items() if name not in LOADING_ATTRIBUTES
            }
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def _checked_overrides(
        self, overrides: dict[str, dict[str, Any]] | None
    ) -> dict[str, dict[str, Any]]:
        if overrides is None:
            return {}
        if not isinstance(overrides, dict):
            raise ConfigError(
                f"BitLabConfig: overrides must be {{pattern: {{field: value}}}}, got {overrides!r}"
            )
        for pattern, values in overrides.items():
            if not isinstance(pattern, str) or not isinstance(values, dict):
                raise ConfigError(
                    "BitLabConfig: overrides must be {pattern: {field: value}}, "
                    f"got {pattern!r}: {values!r}"
                )
            _layer_config({**self._base_fields(), **values})
        # None, as `BitQuantConfig.to_dict` has it of a layer without groups, names no dtype.
        return {
            pattern: {
                name: copy.deepcopy(value)
                for name, value in values.items()
                if name != "group_scale_dtype" or value is not None
            }
            for pattern, values in overrides.items()
        }

    def _checked_embedding(self, embedding: str) -> str:
        """Returns the choice, if it goes with the format of the weights and with the head's."""
        if embedding == "ternary" and self.weight_format != "packed":
            raise ConfigError(
                f"BitLabConfig: embedding must be 'keep' for {self.weight_format} weights, got "
                "'ternary'\nAn embedding is packed where it is ternary already: by "
                "bitlab_hf.convert_ternary or import_gguf."
            )
        if embedding == "ternary" and self.head == "int8":
            raise ConfigError(
                "BitLabConfig: head must be 'keep' or 'ternary' beside a ternary embedding, got "
                "'int8'"
            )
        return embedding

    def _check_first_version(self, given: str | None) -> None:
        """Checks that a file of version 1 has no groups in two levels; its groups have floats."""
        said = {"": given} | {
            f" of {pattern!r}": values.get("group_scale_dtype")
            for pattern, values in self.overrides.items()
        }
        for where, dtype in said.items():
            if dtype == "uint8":
                raise ConfigError(
                    f"BitLabConfig: group_scale_dtype{where} must be 'float32' with format_version "
                    "1, got 'uint8'\nParts of two files are mixed; fetch or write it again."
                )
        # Where nothing is grouped it says nothing, and is not written.
        if given is None and self.format_version > 1:
            self.group_scale_dtype = "float32"

    def _base_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LAYER_FIELDS}

    def layer_config(self, *names: str) -> BitQuantConfig:
        """Returns how the module of this name (or these names) is quantized, overrides applied."""
        values = self._base_fields()
        for pattern, override in self.overrides.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                values.update(override)
        return _layer_config(values)

    @property
    def format_version(self) -> int:
        """The version that a file of this configuration has, which older readers then refuse: 4
        with a ternary embedding or int8 layers, 3 with ternary experts, 2 if layers have groups in
        two levels, else 1.
        """
        if self.embedding == "ternary" or self.int8_layers:
            return 4
        if self.experts == "ternary":
            return 3
        base, given = self._base_fields(), [dict[str, Any]()]
        for values in self.overrides.values():
            # Many layers can be named, with few different values.
            if values not in given:
                given.append(values)
        # One may bring the groups and another their scales.
        layers = ({**base, **first, **second} for first, second in product(given, repeat=2))
        two_levels = any(
            layer["weight_granularity"] == "per_group" and layer["group_scale_dtype"] == "uint8"
            for layer in layers
        )
        return 2 if two_levels else 1

    def layer_name(self, *names: str) -> str:
        """Returns the registered layer for the module of this name (or these names)."""
        return "RMSNormBitLinear" if any(map(self.norms, names)) else self.layer

    def norms(self, name: str) -> bool:
        """Tells whether ``sub_norm`` names a module."""
        ends = (name, name.rpartition(".")[2])
        return any(fnmatch.fnmatchcase(end, p) for p in self.sub_norm for end in ends)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Returns what a configuration given at load may say about a file that has its own."""
        return {name: getattr(self, name) for name in LOADING_ATTRIBUTES}

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json holds: everything but the options of one load."""
        held = {
            name: copy.deepcopy(value)
            for name, value in self.__dict__.items()
            if name not in LOADING_ATTRIBUTES
        }
        version = held["format_version"] = self.format_version
        if version == 1:
            # Its readers do not know the field.
            for values in (held, *held["overrides"].values()):
                values.pop("group_scale_dtype", None)
        # Readers of versions before their own do not know the fields.
        if self.embedding == "keep":
            del held["embedding"]
        if not self.int8_layers:
            del held["int8_layers"]
        if self.experts is None:
            del held["experts"]
        return held


def _check_choice(name: str, value: object) -> None:
    if not any(value == one and type(value) is type(one) for one in _CHOICES[name]):
        raise ConfigError(f"BitLabConfig: {name} must be one of {_CHOICES[name]}, got {value!r}")


def _layer_config(values: dict[str, Any]) -> BitQuantConfig:
    """Returns a layer's configuration; how scales of groups are kept means nothing without them."""
    if values["group_scale_dtype"] is not None:
        _check_choice("group_scale_dtype", values["group_scale_dtype"])
    if values["weight_granularity"] != "per_group":
        values = {**values, "group_scale_dtype": None}
    return BitQuantConfig.from_dict(values)


_KNOWN_FIELDS = {
    *_LAYER_FIELDS,
    *_CHOICES,
    "layer",
    "modules_to_not_convert",
    "int8_layers",
    "overrides",
    "sub_norm",
    "format_version",
    "quant_method",
}


def checked_names(field: str, names: Any, op: str = "BitLabConfig") -> list[str] | None:
    """Returns a list of names, or of globs, or None as it is.

    Raises:
        ConfigError: It is anything else.
    """
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{op}: {field} must be a list of names, got {names!r:.80}")
    return list(names)


def checked_patterns(field: str, names: Any, op: str = "BitLabConfig") -> list[str] | None:
    """Returns a list of names that transformers matches as regular expressions, or None as it is.

    Raises:
        ConfigError: It is anything else, or one is no regular expression.
    """
    patterns = checked_names(field, names, op)
    for pattern in patterns or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{op}: {field} must hold names or regular expressions, got {pattern!r:.80}: "
                f"{error}"
            ) from error
    return patterns
