"""Rotation of the residual stream: the same model in another basis, in which its weights lose less
when they are made ternary.

A decoder whose layers read its residual stream through RMSNorms, and only add to it, computes the
same in any orthonormal basis of the stream: the norms' weights are multiplied into the matrices
behind them, matrices that read are multiplied by the basis, and those that write by its transpose
(SliceGPT, arXiv:2401.15024, section 3.2; a random basis: QuaRot, arXiv:2404.00456, section 4). The
values of each head get one of their own, between the value and the output projection. In a random
basis no input stands out among those of a token, which int8 and scales of groups gain by.

A few directions stay coordinates: the first token of a text, in most models, is hundreds of times
as long as the others, always in the same direction (Sun et al., 2024, arXiv:2402.17762). Spread
over all coordinates, every step of a training moves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError
from bitlab_hf.model.tree import quantized_layers

# Models of which it is known how their parts read and write the stream.
KINDS = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                        "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
}  # fmt: skip
_OUTPUT, _DOWN = "self_attn.o_proj", "mlp.down_proj"
# Have weights, and nothing to do with the stream's basis.
_INNER = ("self_attn.q_norm", "self_attn.k_norm")
# Rows of a matrix that are multiplied at a time, in float64.
_ROWS = 4096
# How far logits may move, in units of their own size, by rounding alone.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 0.1


@dataclass(frozen=True)
class RotationReport:
    """What a rotation did.

    Attributes:
        kept: How many directions of the stream are coordinates of their own.
        share: Their share of the stream's squared size on the samples.
        difference: How far the logits of a sample moved, root mean square, relative.
    """

    kept: int
    share: float
    difference: float

    def __str__(self) -> str:
        return (
            f"rotated; {self.kept} directions with {self.share:.1%} of the stream are kept; "
            f"logits differ by {self.difference:.1e}"
        )


@torch.no_grad()
def rotate(
    model: PreTrainedModel, samples: Iterable[Any], *, kept: int = 4, seed: int = 0
) -> RotationReport:
    """Puts a model's residual stream, and the values of its heads, into another basis, for good.

    It computes what it did, is of the same class, and every program runs it; its embedding and its
    head are no longer tied. Load the result, with a `BitLabConfig`, to make it ternary.

    Args:
        model: A model in full precision, of a kind among `KINDS`; changed in place.
        samples: Texts as for `calibrate`; eight are enough.
        kept: How many directions stay coordinates: those in which the stream is largest.
        seed: Of the basis.

    Returns:
        What was done.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: It is of another kind, or has weights that this kind should not have; there
            are no samples; or kept is no number of directions. The model is as it was.
        LifecycleError: It holds ternary layers: rotate the model that they are made of.
        RuntimeError: It computes something else than before, and must be loaded again.
    """
    _check(model, kept)
    texts = [ids for ids in map(_token_ids, samples) if len(ids) > 1]
    if not texts:
        raise ArgumentError("rotate: samples must hold a text of two tokens, got none")
    before = _logits(model, texts[0])
    moments = _moments(model, texts)
    values, vectors = torch.linalg.eigh(moments)
    generator = torch.Generator().manual_seed(seed)
    own, rest = vectors[:, len(values) - kept :].flip(1), vectors[:, : len(values) - kept]
    basis = torch.cat([own, rest @ _random_basis(rest.shape[1], generator)], 1).to(model.device)
    _rotate_heads(model, generator)
    _rotate_stream(model, basis)
    after = _logits(model, texts[0])
    difference = float((after - before).norm() / before.norm())
    if not difference <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT):
        raise RuntimeError(
            f"rotate: {type(model).__name__} must compute what it did, got logits that differ by "
            f"{difference:.1e} of their size\nLoad it again, and calibrate it as it is."
        )
    share = float(values[len(values) - kept :].sum() / values.sum())
    return RotationReport(kept, share, difference)


def _check(model: Any, kept: int) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            f"rotate: model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    kind, head = model.config.model_type, model.get_output_embeddings()
    if kind not in KINDS or head is None:
        raise ArgumentError(
            f"rotate: model must be a causal LM of a kind among {', '.join(KINDS)}, got "
            f"{type(model).__name__}\nCalibrate it as it is."
        )
    if quantized_layers(model):
        raise LifecycleError(
            "rotate: model must be in full precision, got one with ternary layers\n"
            "Rotate the model that they are made of, and load the result with a BitLabConfig."
        )
    size = model.config.hidden_size
    if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept < size:
        raise ArgumentError(
            f"rotate: kept must be an int from 0 to below the hidden size {size}, got {kept!r}"
        )
    known = {
        *_READERS,
        *_INNER,
        _OUTPUT,
        _DOWN,
        *(name for names in _READERS.values() for name in names),
    }
    for layer in _layers(model):
        for name, _ in layer.named_parameters():
            if name.rpartition(".")[0] not in known:
                raise ArgumentError(
                    f"rotate: the layers of a {kind} model must hold no weights but their norms "
                    f"and linear layers, got {name}\nCalibrate it as it is."
                )


def _token_ids(sample: Any) -> Tensor:
    ids = sample["input_ids"] if isinstance(sample, dict) else sample
    return torch.as_tensor(ids).reshape(-1)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    return logits.float()


def _moments(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    """Returns the second moments of what the decoder layers read, float64 [H, H]."""
    size = model.config.hidden_size
    moments = torch.zeros(size, size, dtype=torch.float64)

    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        flat = stream.reshape(-1, size).double()
        moments.add_((flat.t() @ flat).cpu())

    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in _layers(model)]
    try:
        for ids in texts:
            _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _random_basis(size: int, generator: torch.Generator) -> Tensor:
    """Returns a random orthonormal basis, float64 [size, size]."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(normal)[0]
    return basis


def _change(weight: Tensor, change: Any) -> None:
    """Changes rows of a matrix in float64, a part of them at a time."""
    for rows in weight.split(_ROWS):
        rows.copy_(change(rows.double()))


def _rotate_stream(model: PreTrainedModel, basis: Tensor) -> None:
    """Multiplies the norms into what reads the stream, and the basis into what reads or writes."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    # The head reads through a norm, and the embedding writes without.
    own = head.weight.detach().clone()
    head.weight = nn.Parameter(own, requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    _change(embedding.weight, lambda rows: rows @ basis)
    for norm, readers in _norms(model):
        scale = norm.weight.double()
        for reader in readers:
            _change(reader.weight, partial(lambda scale, rows: (rows * scale) @ basis, scale))
        norm.weight.fill_(1)
    for layer in _layers(model):
        for name in (_OUTPUT, _DOWN):
            writer = layer.get_submodule(name)
            # Columns at a time: each is a direction of the stream.
            for columns in writer.weight.split(_ROWS, dim=1):
                columns.copy_(basis.t() @ columns.double())
            if writer.bias is not None:
                writer.bias.copy_(basis.t() @ writer.bias.double())


def _norms(model: PreTrainedModel) -> Iterator[tuple[Any, list[Any]]]:
    """Yields each norm with the matrices that read the stream through it."""
    for layer in _layers(model):
        held = dict(layer.named_modules())
        for norm, readers in _READERS.items():
            yield held[norm], [held[name] for name in readers if name in held]
    base: Any = model.base_model
    yield base.norm, [model.get_output_embeddings()]


def _layers(model: PreTrainedModel) -> Iterable[Any]:
    base: Any = model.base_model
    layers: Iterable[Any] = base.layers
    return layers


def _rotate_heads(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Rotates what each head adds up: the rows of values, the columns of the output projection."""
    config = model.config
    heads, values = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer in _layers(model):
        basis = _random_basis(size, generator).to(layer.self_attn.o_proj.weight.device)
        attention = layer.self_attn
        # In a fused one they come last.
        value = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.v_proj
        for tensor in (value.weight, value.bias):
            if tensor is not None:
                rows = tensor[-values * size :].unflatten(0, (values, size))
                turned = torch.einsum("vs...,sr->vr...", rows.double(), basis)
                rows.copy_(turned)
        columns = attention.o_proj.weight.unflatten(1, (heads, size))
        columns.copy_(columns.double() @ basis)
