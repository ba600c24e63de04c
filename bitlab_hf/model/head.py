"""The output head in int8, with what is tied to it: found, checked, swapped, tied again.

transformers ties parameters by name (``_tied_weights_keys``, ``all_tied_weights_keys``); once the
weights are gone, the same pairs are named after ``qweight`` and ``qweight_scale``, so that loading,
saving, device maps and ``tie_weights()`` go on as they do for float weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore.errors import ConfigError, NonFiniteError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.tree import Found, find_modules, set_module, take_hooks
from bitlab_hf.model.vocabulary import FixedVocabulary
from bitlayers.checks import check_whole
from bitlayers.int8 import Int8Embedding, Int8Linear, Int8Rows

_LEAVES = ("qweight", "qweight_scale")
_FIX = 'Use head="keep".'
# Where `replace_linear` leaves the choice of the head for `deploy`.
HEAD_ATTRIBUTE = "_bitlab_head"


@dataclass
class Rows:
    """The modules that share one float matrix [V, K]: an output head, an embedding, or both.

    Attributes:
        members: The modules; the first is the one whose names a file holds.
        tied: What transformers ties in the model and each model inside it, by its name there.
    """

    members: list[Found[nn.Module]]
    tied: dict[str, dict[str, str]]

    @property
    def names(self) -> list[str]:
        """Every name of every member."""
        return [name for member in self.members for name in member.names]

    @property
    def owner(self) -> str:
        """The name under which a file holds the tensors."""
        return self.members[0].names[0]

    @property
    def tensor(self) -> Tensor:
        """The shared matrix: ``weight`` before the swap, ``qweight`` after it."""
        module = self.members[0].module
        return cast(Tensor, module.qweight if isinstance(module, Int8Rows) else module.weight)


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Returns the model's input embedding, or None where it has none."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        # transformers' way to say that a model has none.
        return None
    return found


def find_rows(model: PreTrainedModel, module: nn.Module) -> Rows:
    """Returns a module with all modules that hold the same weight.

    A skeleton's weights are tied by name only, as the configuration says.

    Raises:
        ConfigError: The weight is also a parameter of another name than ``weight``.
    """
    weight = module.weight
    shared = {id(weight)}
    if weight.is_meta:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = model.all_tied_weights_keys.items()
        # Targets of one source are tied to each other, whichever of them the module is.
        for _ in range(2):
            for pair in pairs:
                held = {id(parameters[name]) for name in pair if name in parameters}
                shared |= held if held & shared else set()
    members: dict[int, Found[nn.Module]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf != "weight":
            raise ConfigError(f'bitlab: head="int8" must find weights only, got {name}\n{_FIX}')
        holder = model.get_submodule(parent)
        members.setdefault(id(holder), Found(holder)).names.append(parent)
    targets = model.all_tied_weights_keys
    ordered = sorted(
        members.values(), key=lambda found: f"{found.names[0]}.weight" in targets
    )  # stable: the source of the others comes first
    tied = {
        name: part.get_expanded_tied_weights_keys(all_submodels=False)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    }
    return Rows(ordered, tied)


def find_head(model: PreTrainedModel) -> Rows | None:
    """Returns the output head with what is tied to it, checked to have an int8 form.

    Raises:
        ConfigError: The head, or a module tied to it, has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    if type(head) is not nn.Linear:
        raise ConfigError(
            f'bitlab: head="int8" must find an output head that is an nn.Linear, got '
            f"{type(head).__name__}\n{_FIX}"
        )
    rows = find_rows(model, head)
    check_supported(model, rows)
    return rows


def check_supported(model: PreTrainedModel, rows: Rows) -> None:
    """Checks that every member has an int8 form that does the same.

    Raises:
        ConfigError: One has not; the message names it.
    """
    tied_names = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for found in rows.members:
        module, name = found.module, found.names[0]
        if isinstance(module, nn.Embedding):
            if embedding_factor(module) is None or module.max_norm is not None:
                raise ConfigError(
                    f'bitlab: head="int8" must find a plain embedding at {name}, or one that only '
                    f"scales its rows, got {module!r}\n{_FIX}"
                )
        elif type(module) is not nn.Linear:
            raise ConfigError(
                f'bitlab: head="int8" must find an nn.Linear or an nn.Embedding at {name}, got '
                f"{type(module).__name__}\n{_FIX}"
            )
        elif module.bias is not None and (
            len(rows.members) > 1 or any(f"{name}.bias" in tied_names for name in found.names)
        ):
            # transformers pads a tied head's bias to the length of its weight, which is gone.
            raise ConfigError(
                f'bitlab: head="int8" must find a tied head without bias, got {name}.bias\n{_FIX}'
            )


def embedding_factor(embedding: nn.Module) -> tuple[float, bool] | None:
    """Returns what an embedding multiplies its rows with; None where it does anything else.

    Many of transformers' embeddings multiply with a factor: Gemma's with one that is rounded to the
    dtype of the weight first, BART's with a Python number. Which it is, and that it is all, is
    found out by trying the class on four rows.

    Returns:
        The factor, and whether it is rounded first.
    """
    if type(embedding) is nn.Embedding:
        return 1.0, True
    tensors = {name for name, _ in embedding.named_parameters()}
    tensors |= {name for name, _ in embedding.named_buffers()}
    factor = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(embedding, nn.Embedding) or not isinstance(factor, (int, float)):
        return None
    if not tensors <= {"weight", "embed_scale"}:
        return None
    with torch.device("cpu"):
        return _tried_factor(embedding, float(factor))


def _tried_factor(embedding: nn.Embedding, factor: float) -> tuple[float, bool] | None:
    rows = torch.linspace(-1, 1, 32).view(4, 8).bfloat16()
    tried = copy.copy(embedding)
    fields = vars(tried)
    fields["_parameters"] = {"weight": nn.Parameter(rows, requires_grad=False)}
    fields["_buffers"] = dict.fromkeys(embedding._buffers, torch.tensor(factor))
    tried.padding_idx = None
    try:
        got = type(embedding).forward(tried, torch.arange(4))
    except (RuntimeError, AttributeError, TypeError):
        # It does more than look rows up.
        return None
    for rounded in (True, False):
        if torch.equal(got, rows * (torch.tensor(factor).bfloat16() if rounded else factor)):
            return factor, rounded
    return None


def _skeleton(module: nn.Module) -> Int8Linear | Int8Embedding:
    skeleton: Int8Linear | Int8Embedding
    if isinstance(module, nn.Embedding):
        scaled = () if type(module) is nn.Embedding else embedding_factor(module) or ()
        skeleton = Int8Embedding.skeleton(module, *scaled)
    else:
        assert isinstance(module, nn.Linear)
        skeleton = Int8Linear.skeleton(module)
    # transformers would fill the weight of an embedding that it takes for a new one.
    skeleton._is_hf_initialized = True
    return skeleton


def swap_skeletons(model: PreTrainedModel, rows: Rows) -> None:
    """Puts int8 modules in, for a loader to fill the first; the others take its tensors later."""
    first: Tensor | None = None
    for found in rows.members:
        module = _skeleton(found.module)
        if first is None:
            first = module.qweight
        else:
            # No scale: a loader would miss it. The qweight it ties as it tied the weight.
            module.qweight, module.qweight_scale = first, None  # type: ignore[assignment]
        _put(model, found, module)
    model.all_tied_weights_keys = _renamed(model.all_tied_weights_keys, rows.names, _LEAVES[:1])


def swap_quantized(model: PreTrainedModel, rows: Rows, qweight: Tensor, scale: Tensor) -> None:
    """Puts int8 modules in that share these tensors."""
    shared = nn.Parameter(qweight, requires_grad=False)
    for tensor in (shared, scale):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for found in rows.members:
        _put(model, found, _skeleton(found.module).commit(shared, scale))
    model.all_tied_weights_keys = _renamed(model.all_tied_weights_keys, rows.names, _LEAVES[:1])


def _put(model: nn.Module, found: Found[nn.Module], module: nn.Module) -> None:
    take_hooks(found.module, module)
    found.module = module
    for name in found.names:
        set_module(model, name, module)


def finish(model: PreTrainedModel, rows: Rows) -> None:
    """After the tensors are there: ties all members, here and in what transformers will tie."""
    owner = rows.members[0].module
    assert isinstance(owner, Int8Rows)
    for found in rows.members:
        module = found.module
        assert isinstance(module, Int8Rows)
        module.commit(owner.qweight, owner.qweight_scale)
        module.qweight.requires_grad_(False)
        if isinstance(module, Int8Linear) and module.bias is not None:
            module.bias.requires_grad_(False)
    for prefix, tied in rows.tied.items():
        part: Any = model.get_submodule(prefix)
        names = [name.removeprefix(f"{prefix}.") if prefix else name for name in rows.names]
        renamed = _renamed(tied, names, _LEAVES)
        if renamed != tied:
            part._tied_weights_keys = renamed
            part.all_tied_weights_keys = _renamed(part.all_tied_weights_keys, names, _LEAVES[:1])
        embedding = input_embeddings(part)
        if isinstance(embedding, Int8Rows) or isinstance(part.get_output_embeddings(), Int8Rows):
            part.resize_token_embeddings = FixedVocabulary(embedding)


def _renamed(tied: dict[str, str], names: Iterable[str], leaves: tuple[str, ...]) -> dict[str, str]:
    """Names pairs of weights after what took their place; a pair of which one half is left is
    dropped.
    """
    gone = {f"{name}.weight" for name in names}
    renamed: dict[str, str] = {}
    for target, source in tied.items():
        if target not in gone and source not in gone:
            renamed[target] = source
        elif target in gone and source in gone:
            for leaf in leaves:
                renamed[target.removesuffix("weight") + leaf] = source.removesuffix("weight") + leaf
    return renamed


# What `deploy` does.


@dataclass
class Plan:
    """What `deploy` will put in: the members, and the tensors made for them."""

    rows: Rows
    qweight: Tensor
    scale: Tensor

    def commit(self, model: PreTrainedModel) -> None:
        """Swaps the members."""
        swap_quantized(model, self.rows, self.qweight, self.scale)
        finish(model, self.rows)


def plan_head(model: nn.Module) -> Plan | None:
    """Quantizes the head of a model beside it, if its configuration says so; changes nothing.

    Returns:
        What to commit; None where the head stays as it is, or there is none.

    Raises:
        ConfigError: The head has no int8 form.
        LifecycleError: Its weight is sharded, or on the meta device.
        NonFiniteError: It holds NaN or infinity.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config = getattr(model.config, "quantization_config", None)
    choice = config.head if isinstance(config, BitLabConfig) else None
    if (choice or getattr(model, HEAD_ATTRIBUTE, "keep")) != "int8":
        return None
    if isinstance(model.get_output_embeddings(), Int8Linear):
        return None
    rows = find_head(model)
    if rows is None:
        return None
    name = f"{rows.owner}.weight"
    for found in rows.members:
        check_whole(found.module, f"{found.names[0]}.weight")
    qweight, scale = quantize_rows_int8(rows.tensor)
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(f"deploy: {name} must be finite, got NaN or infinity; nothing changed")
    return Plan(rows, qweight, scale)


# What a model with int8 modules says about them.


def int8_modules(model: nn.Module) -> list[Found[Int8Rows]]:
    """Returns the int8 modules of a model, each once."""
    return find_modules(model, Int8Rows)


def is_borrower(model: PreTrainedModel, found: Found[Int8Rows]) -> bool:
    """Tells whether a file holds the tensors of an int8 module under another one's name."""
    tied = model.all_tied_weights_keys
    return any(f"{name}.qweight" in tied for name in found.names)


def restore_float(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Puts float modules back for int8 ones, with codes times scale, tied as before."""
    weights: dict[int, nn.Parameter] = {}
    for found in int8_modules(model):
        module = found.module
        key = id(module.qweight)
        if key not in weights:
            weights[key] = nn.Parameter(module.dequantized_weight(dtype))
        restored = _float_module(module, weights[key])
        take_hooks(module, restored)
        for name in found.names:
            set_module(model, name, restored.train(module.training))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for name in ("_tied_weights_keys", "resize_token_embeddings"):
                part.__dict__.pop(name, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _float_module(module: Int8Rows, weight: nn.Parameter) -> nn.Module:
    rows, columns = weight.shape
    if isinstance(module, Int8Linear):
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = weight
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(weight.dtype))
        return linear
    assert isinstance(module, Int8Embedding)
    # Made with one row: no weight is allocated and filled only to be dropped.
    make: Any = module.float_class
    if make is nn.Embedding:
        embedding = make(1, columns)
    else:
        embedding = make(1, columns, None, embed_scale=module.embed_scale)
        embedding = embedding.to(device=weight.device, dtype=weight.dtype)
    embedding.weight = weight
    embedding.num_embeddings, embedding.padding_idx = rows, module.padding_idx
    restored: nn.Module = embedding
    return restored
