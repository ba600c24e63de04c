"""How one layer is quantized: a frozen, validated dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitcore.checks import GROUP_SIZES
from bitcore.errors import ConfigError
from bitcore.estimators import get_estimator

ALLOWED: dict[str, tuple[object, ...]] = {
    "activation_dtype": ("int8", "float32"),
    "activation_granularity": ("per_token", "per_tensor", "per_channel"),
    "weight_granularity": ("per_tensor", "per_channel", "per_group"),
    "group_size": (None, *GROUP_SIZES),
    "group_scale_dtype": (None, "uint8", "float32"),
}


@dataclass(frozen=True)
class BitQuantConfig:
    """Quantization of one ternary layer (BitNet b1.58, arXiv 2402.17764).

    Args:
        activation_dtype: ``"int8"`` quantizes activations, ``"float32"`` leaves them as they are
            (in the compute dtype, whatever it is).
        activation_granularity: One scale a token (``"per_token"``; ``"per_channel"`` is another
            name for it) or one for the whole input (``"per_tensor"``: outputs then depend on the
            batch, on padding and on the cache).
        weight_granularity: One scale for the matrix (``"per_tensor"``), a row, or a group of
            ``group_size`` inputs. One for the matrix is BitNet's choice, right for what is trained
            ternary from the start and for files of transformers' own ``bitnet`` method. A
            pretrained model keeps far more of what it knows with ``"per_group"``, at 2.13 bits a
            weight (groups of 64) instead of 2.
        group_size: 64 or 128 with ``"per_group"``, which must divide in_features; else None.
        group_scale_dtype: How scales of groups are kept: ``"uint8"``, the default with
            ``"per_group"``, has one float32 scale a row and an integer from 1 to 127 for each
            group, which the kernels multiply exactly; ``"float32"`` has a float for each group,
            which costs half a bit a weight at groups of 64 and is several times slower. Else None.
        weight_quantizer: The estimator of steps and scales: ``"absmean"`` (BitNet b1.58),
            ``"absmax"``, ``"twn"``, ``"lsq"`` (a trained scale), or one of your own; see
            `bitcore.estimators`.

    Raises:
        ConfigError: A field has a value that is not allowed; the message lists those that are.
    """

    activation_dtype: str = "int8"
    activation_granularity: str = "per_token"
    weight_granularity: str = "per_tensor"
    group_size: int | None = None
    group_scale_dtype: str | None = None
    weight_quantizer: str = "absmean"

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            # `True == 1` and `64.0 == 64`: the type has to match too.
            if not any(value == item and type(value) is type(item) for item in allowed):
                raise ConfigError(f"BitQuantConfig: {name} must be one of {allowed}, got {value!r}")
        get_estimator(self.weight_quantizer)
        if self.activation_granularity == "per_channel":
            object.__setattr__(self, "activation_granularity", "per_token")
        grouped = self.weight_granularity == "per_group"
        if grouped and self.group_size is None:
            raise ConfigError(
                "BitQuantConfig: group_size must be one of (64, 128) with "
                "weight_granularity='per_group', got None"
            )
        if not grouped and self.group_size is not None:
            raise ConfigError(
                f"BitQuantConfig: group_size must be None with weight_granularity="
                f"{self.weight_granularity!r}, got {self.group_size!r}\n"
                "Set weight_granularity='per_group' to use groups."
            )
        if not grouped and self.group_scale_dtype is not None:
            raise ConfigError(
                f"BitQuantConfig: group_scale_dtype must be None with weight_granularity="
                f"{self.weight_granularity!r}, got {self.group_scale_dtype!r}\n"
                "Set weight_granularity='per_group' to use groups."
            )
        if grouped and self.group_scale_dtype is None:
            object.__setattr__(self, "group_scale_dtype", "uint8")

    @property
    def activation(self) -> str:
        """The ops' name of the activation scheme: int8_per_token, int8_per_tensor or float."""
        if self.activation_dtype == "float32":
            return "float"
        return f"int8_{self.activation_granularity}"

    @property
    def granularity(self) -> str:
        """The ops' name of the weights' scheme: per_tensor, per_channel, per_group or
        per_group_float32.
        """
        if self.group_scale_dtype == "float32":
            return "per_group_float32"
        return self.weight_granularity

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BitQuantConfig:
        """Builds a configuration from `to_dict`'s result.

        Raises:
            ConfigError: A key is unknown, or a value is not allowed.
        """
        check_fields(cls, values)
        return cls(**values)


def check_fields(owner: type, values: Mapping[str, Any]) -> None:
    """Checks that the keys are fields of a dataclass.

    Raises:
        ConfigError: One is not; the message lists those that are.
    """
    known = {field.name for field in fields(owner)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{owner.__name__}: keys must be among {sorted(known)}, "
            f"got {', '.join(map(repr, unknown))}"
        )
