"""What a compiled step of one token depends on, and what it is called with.

See `bitlab_hf.model.decoding`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.kernels.inductor import inductor_options
from bitlayers.stack import Stack

# What differs between layers without making their steps differ.
_PLACES = ("layer_idx", "training", "forward")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, BitQuantConfig, Stack)
_NOT_INPUTS = ("past_key_values", "attention_mask")
# Up to how many tokens the cache is read, where what is beyond the last does no harm.
_GRAIN = 64

Run = Callable[[list[Tensor]], list[Tensor]]


class UnfitError(Exception):
    """A layer cannot be compiled; says why."""


class Inputs:
    """What a model gives a layer for one token, but hidden states and cache: tensors, and the form
    they came in.

    Args:
        args: Positional arguments of the layer after its hidden states.
        kwargs: The others, with an attention_mask.
        tokens: How many the cache will hold with this one.
        exact: Whether no place of the cache beyond is to be read.

    Attributes:
        tensors: All tensors but the mask, tuples of them taken apart.
        form: For each argument its name, and how many tensors a tuple had (0 for a tensor alone),
            or None and its value.
        mask: The attention mask, bool [..., tokens or a few more]: the rest of the cache is empty.
        strange: Names of arguments that are neither.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int, exact: bool
    ) -> None:
        self.tensors: list[Tensor] = []
        self.form: list[tuple[int | str, int | None, Any]] = []
        cut = tokens if exact else -(-tokens // _GRAIN) * _GRAIN
        self.mask: Tensor = kwargs["attention_mask"][..., :cut]
        self.strange: list[int | str] = []
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for name, value in named:
            if name in _NOT_INPUTS:
                continue
            if isinstance(value, Tensor):
                self.tensors.append(value)
                self.form.append((name, 0, None))
            elif isinstance(value, tuple) and value and all(isinstance(o, Tensor) for o in value):
                self.tensors.extend(value)
                self.form.append((name, len(value), None))
            elif value is None or isinstance(value, bool | str):
                self.form.append((name, None, value))
            else:
                self.strange.append(name)

    def sees_all(self) -> bool:
        """Tells whether the mask hides none of the tokens: there is no padding."""
        return bool(self.mask.all())

    def rebuild(self, tensors: list[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Returns the arguments with other tensors in the place of these."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        left = iter(tensors)
        for name, count, value in self.form:
            if count is not None:
                value = tuple(next(left) for _ in range(count)) if count else next(left)
            if isinstance(name, int):
                args.append(value)
            else:
                kwargs[name] = value
        return args, kwargs


class Surroundings:
    """What the steps of a model's layers depend on beside the layer.

    Args:
        config: The model's configuration.
        exact: See `bitlab_hf.model.decoding.compile_decoding`.
    """

    def __init__(self, config: Any, exact: bool) -> None:
        self.exact = exact
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else []
        own = sorted(Path(__file__).parent.glob("decoding*.py"))
        self._lines = [
            torch.__version__,
            transformers.__version__,
            platform.machine(),
            next((line for line in lines if line.startswith(("flags", "Features"))), ""),
            repr(inductor_options()),
            *(file.read_text() for file in own),
            config.to_json_string(use_diff=False),
            str(exact),
        ]

    def lines(self) -> list[str]:
        """Returns it as text."""
        return [*self._lines, str(torch.get_num_threads())]


class FittedStep:
    """A step with a layer's weights, called with the inputs of a token.

    Args:
        module: The layer.
        hidden: A token's hidden states.
        inputs: Its other inputs.

    Attributes:
        run: The step's library.
    """

    run: Run

    def __init__(self, module: nn.Module, hidden: Tensor, inputs: Inputs) -> None:
        self._weights = weights_of(module)
        self._given = list(self._weights.values())
        self._kinds = _kinds_of(self._weights)
        self._form = inputs.form
        self._shapes = self._shapes_of(hidden, inputs)

    @staticmethod
    def _shapes_of(hidden: Tensor, inputs: Inputs) -> list[Any]:
        shapes = [(one.shape, one.dtype) for one in (hidden, *inputs.tensors)]
        return [*shapes, inputs.mask.shape[:-1]]

    def fits(self, module: nn.Module, hidden: Tensor, inputs: Inputs, same_weights: bool) -> bool:
        """Tells whether the step serves other inputs, and a layer that may have other weights."""
        if (
            self._form != inputs.form
            or self._shapes != self._shapes_of(hidden, inputs)
            or inputs.strange
        ):
            return False
        if same_weights:
            return True
        weights = weights_of(module)
        return (
            list(weights) == list(self._weights)
            and all(map(operator.is_, weights.values(), self._given))
            and _kinds_of(weights) == self._kinds
            and not _is_hooked(module)
        )

    def describe(
        self, module: nn.Module, inputs: Inputs, held: Any, surroundings: Surroundings
    ) -> str:
        """Returns what the step's library depends on, as a hash.

        Args:
            module: The layer.
            inputs: Those of a token.
            held: The layer's cache.
            surroundings: The rest.

        Raises:
            UnfitError: An argument or a weight is nothing that a library takes.
        """
        if inputs.strange:
            raise UnfitError(f"its arguments {inputs.strange} are no tensors")
        if _is_hooked(module):
            raise UnfitError("its modules have hooks")
        for name, one in self._weights.items():
            if not one.is_contiguous() or type(one) not in (Tensor, nn.Parameter, nn.Buffer):
                raise UnfitError(f"{name} is no ordinary contiguous tensor")
        described = {
            "inputs": [repr(one) for one in (*self._form, *self._shapes)],
            "cache": [repr((o.shape[:2], o.shape[3], o.dtype)) for o in (held.keys, held.values)],
            "weights": [repr(one) for one in zip(self._weights, self._kinds, strict=True)],
            "layer": _describe(module),
            "surroundings": surroundings.lines(),
        }
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, hidden: Tensor, inputs: Inputs, held: Any) -> Tensor:
        """Runs the step on a token; writes to the cache, and returns the layer's output."""
        given = [
            hidden, *inputs.tensors, inputs.mask, held.keys, held.values, held.cumulative_length,
            *self._given,
        ]  # fmt: skip
        return self.run(given)[0]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a layer's parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _kinds_of(weights: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    return [(one.shape, one.dtype, one.device, one.is_contiguous()) for one in weights.values()]


def _is_hooked(module: nn.Module) -> bool:
    """Tells whether modules within a layer call hooks, which a library would not."""
    return any(
        one._forward_hooks or one._forward_pre_hooks
        for one in module.modules()
        if one is not module
    )


def _is_plain(value: Any) -> bool:
    """Tells whether what repr says of a value is all there is."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _describe(module: nn.Module) -> list[str]:
    """Returns what a layer's forward can depend on beside its tensors: classes with their source,
    and plain fields.
    """
    lines: list[str] = []
    files: set[str] = set()
    for name, one in module.named_modules():
        kind = type(one)
        fields = sorted(
            (key, repr(value))
            for key, value in vars(one).items()
            if key not in _PLACES and _is_plain(value)
        )
        lines.append(f"{name}: {kind.__module__}.{kind.__qualname__} {fields}")
        files |= _files_of(kind)
    return [*lines, *(_hash_of(file) for file in sorted(files))]


def _files_of(kind: type) -> frozenset[str]:
    modules = (sys.modules.get(base.__module__) for base in kind.__mro__)
    return frozenset(file for one in modules if (file := getattr(one, "__file__", None)))


@cache
def _hash_of(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
