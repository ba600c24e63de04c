"""One decoder layer's step of one token as a library: exported, compiled, kept, called.

See `bitlab_hf.model.decoding`. The library takes everything as an input: what the model gives the
layer, the cache's tensors, which it writes to, and the layer's weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from bitcore.errors import BackendError
from bitcore.kernels.inductor import inductor_options, sum_as_eager
from bitcore.user_cache import cache_folder
from bitlab_hf.model.decoding_attention import NAME as ATTENTION
from bitlab_hf.model.decoding_attention import attend

# Of the cache and of the mask while a step is exported; both may be any in the library.
_EXAMPLE_LENGTH, _EXAMPLE_CUT = 320, 192
# What differs between layers without making their steps differ.
_PLACES = ("layer_idx", "training", "forward")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_NOT_INPUTS = ("past_key_values", "attention_mask")

AttentionInterface.register(ATTENTION, attend)


class UnfitError(Exception):
    """A layer cannot be compiled; says why."""


class OneLayerCache(Cache):  # type: ignore[misc]
    """A cache of one layer, whatever place the layer says that it has."""

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__(layers=[layer])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes to the layer; see transformers."""
        keys, values = self.layers[0].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Returns how many tokens the layer holds."""
        return self.layers[0].get_seq_length()


class Inputs:
    """What a model gives a layer for one token, but hidden states and cache: tensors, and the form
    they came in.

    Args:
        args: Positional arguments of the layer after its hidden states.
        kwargs: The others, with an attention_mask.
        tokens: How many the cache will hold with this one.

    Attributes:
        tensors: All tensors but the mask, tuples of them taken apart.
        form: For each argument its name, and how many tensors a tuple had (0 for a tensor alone),
            or None and its value.
        mask: The attention mask, bool [..., tokens]: the cache's other places are empty.
        strange: Names of arguments that are neither.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> None:
        self.tensors: list[Tensor] = []
        self.form: list[tuple[int | str, int | None, Any]] = []
        self.mask: Tensor = kwargs["attention_mask"][..., :tokens]
        self.strange: list[int | str] = []
        for name, value in (*enumerate(args), *kwargs.items()):
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


class Outline:
    """What the inputs of all tokens that one step serves have in common.

    Args:
        hidden: The hidden states.
        inputs: The rest.
    """

    def __init__(self, hidden: Tensor, inputs: Inputs) -> None:
        self._form = inputs.form
        self._shapes = self._shapes_of(hidden, inputs)

    @staticmethod
    def _shapes_of(hidden: Tensor, inputs: Inputs) -> list[Any]:
        shapes = [(one.shape, one.dtype) for one in (hidden, *inputs.tensors)]
        return [*shapes, inputs.mask.shape[:-1]]

    def are_like(self, hidden: Tensor, inputs: Inputs) -> bool:
        """Tells whether the step serves other inputs, too."""
        return (
            self._form == inputs.form
            and self._shapes == self._shapes_of(hidden, inputs)
            and not inputs.strange
        )

    def lines(self) -> list[str]:
        """Returns it as text."""
        return [repr(one) for one in (*self._form, *self._shapes)]


def describe_step(
    module: nn.Module, outline: Outline, inputs: Inputs, held: StaticLayer, config: Any
) -> tuple[str, list[Tensor]]:
    """Returns what a step's library depends on, as a hash; and the layer's weights.

    Args:
        module: The layer.
        outline: Of the inputs.
        inputs: Those of a token.
        held: The layer's cache.
        config: The model's configuration.

    Raises:
        UnfitError: An argument or a weight is nothing that a library takes.
    """
    if inputs.strange:
        raise UnfitError(f"its arguments {inputs.strange} are no tensors")
    weights = _weights(module)
    for name, weight in weights.items():
        if not weight.is_contiguous() or type(weight) not in (Tensor, nn.Parameter, nn.Buffer):
            raise UnfitError(f"{name} is no ordinary contiguous tensor")
    described = {
        "inputs": outline.lines(),
        "cache": [repr((one.shape[:2], one.shape[3], one.dtype)) for one in (held.keys, held.values)],
        "weights": [repr((name, one.shape, one.dtype)) for name, one in weights.items()],
        "layer": _describe(module),
        "config": config.to_json_string(use_diff=False),
        "machine": _machine(),
    }  # fmt: skip
    text = json.dumps(described, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), list(weights.values())


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _describe(module: nn.Module) -> list[str]:
    """Returns what a layer's forward can depend on beside its tensors: classes with their source,
    and plain fields.
    """
    lines, files = [], set()
    for name, one in module.named_modules():
        kind = type(one)
        fields = {
            key: repr(value)
            for key, value in vars(one).items()
            if key not in _PLACES and (isinstance(value, _PLAIN) or key == "quant_config")
        }
        lines.append(f"{name}: {kind.__module__}.{kind.__qualname__} {sorted(fields.items())}")
        files |= {getattr(sys.modules.get(base.__module__), "__file__", None) for base in kind.__mro__}
    contents = [Path(file).read_bytes() for file in sorted(files - {None}) if Path(file).is_file()]
    return [*lines, hashlib.sha256(b"".join(contents)).hexdigest()]


def _machine() -> list[str]:
    """Returns what compiled code depends on: versions, options, threads, the CPU."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    attention = Path(sys.modules[attend.__module__].__file__ or "").read_text()
    return [
        torch.__version__, transformers.__version__, platform.machine(), flags,
        str(torch.get_num_threads()), repr(inductor_options()), Path(__file__).read_text(), attention,
    ]  # fmt: skip


class Step:
    """A compiled step; see `load_step`."""

    def __init__(self, library: Path) -> None:
        self._model = torch._inductor.aoti_load_package(str(library))
        self._run: Callable[[list[Tensor]], list[Tensor]] = self._model.loader.run

    def __call__(
        self, hidden: Tensor, inputs: Inputs, held: StaticLayer, weights: list[Tensor]
    ) -> Tensor:
        """Runs the step on a token; writes to the cache, and returns the layer's output."""
        given = [
            hidden, *inputs.tensors, inputs.mask, held.keys, held.values, held.cumulative_length,
            *weights,
        ]  # fmt: skip
        return self._run(given)[0]


def load_step(
    key: str,
    module: nn.Module,
    forward: Callable[..., Any],
    hidden: Tensor,
    inputs: Inputs,
    held: StaticLayer,
) -> Step:
    """Loads a layer's step from the user's cache, or compiles and keeps it.

    Args:
        key: What it depends on, as `describe_step` has it.
        module: The layer.
        forward: Its own forward.
        hidden: The hidden states of a token.
        inputs: Its other inputs.
        held: The layer's cache.

    Raises:
        UnfitError: The layer cannot be exported.
        BackendError: It cannot be compiled here.
    """
    folder = cache_folder("decoding")
    library = None if folder is None else folder / f"{key}.pt2"
    if library is not None and library.is_file():
        try:
            return Step(library)
        except Exception:  # noqa: BLE001  (whatever a damaged file makes the loader raise)
            library.unlink(missing_ok=True)
    exported = _export(module, forward, hidden, inputs, held)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        try:
            made = torch._inductor.aoti_compile_and_package(
                exported, package_path=f"{draft}/step.pt2", inductor_configs=inductor_options()
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(
                f"compile_decoding: a layer must compile, got: {reason[0]}\n"
                "A C++ compiler is needed: install g++ or clang++, or name one in CXX."
            ) from error
        if library is None:
            return Step(Path(made))
        shutil.move(str(made), library)
    return Step(library)


class _Exported(nn.Module):
    """A layer's step as a function of tensors."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], inputs: Inputs) -> None:
        super().__init__()
        # Not as a submodule: its weights are inputs.
        self.__dict__["_layer"], self._inputs = (module, forward), inputs

    def forward(
        self,
        hidden: Tensor,
        tensors: list[Tensor],
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        weights: list[Tensor],
    ) -> Any:
        module, forward = self.__dict__["_layer"]
        held = StaticLayer.__new__(StaticLayer)
        held.keys, held.values, held.cumulative_length = keys, values, length
        held.device, held.dtype, held.is_initialized = keys.device, keys.dtype, True
        held.max_cache_len = keys.shape[2]
        args, kwargs = self._inputs.rebuild(tensors)
        kwargs |= {"attention_mask": mask, "past_key_values": OneLayerCache(held)}
        named = dict(zip(_weights(module), weights, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(module, named):
            return forward(hidden, *args, **kwargs)


def _export(
    module: nn.Module,
    forward: Callable[..., Any],
    hidden: Tensor,
    inputs: Inputs,
    held: StaticLayer,
) -> Any:
    keys, values = (
        one.new_zeros((*one.shape[:2], _EXAMPLE_LENGTH, one.shape[3]))
        for one in (held.keys, held.values)
    )
    mask = inputs.mask.new_ones((*inputs.mask.shape[:-1], _EXAMPLE_CUT))
    weights = list(_weights(module).values())
    length = held.cumulative_length.clone()
    example = (hidden, inputs.tensors, mask, keys, values, length, weights)
    any_length = torch.export.Dim.AUTO
    shapes = (
        None,
        [None] * len(inputs.tensors),
        {mask.dim() - 1: any_length},
        {2: any_length},
        {2: any_length},
        None,
        [None] * len(weights),
    )
    try:
        with torch.no_grad(), _attention(module):
            exported = torch.export.export(
                _Exported(module, forward, inputs), example, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnfitError(f"torch.export cannot take it: {reason[0]}") from error
    if len(exported.graph_signature.user_outputs) != 1:
        raise UnfitError("it returns several values")
    sum_as_eager(exported.graph)
    exported.graph_module.recompile()
    return exported


@contextmanager
def _attention(module: nn.Module) -> Iterator[None]:
    """Makes a layer attend as a compiled step does."""
    configs = {id(one.config): one.config for one in module.modules() if hasattr(one, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
