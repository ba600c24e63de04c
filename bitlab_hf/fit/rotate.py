"""Rotation of the residual stream: the same model in another basis, in which its weights lose less
when they are made ternary.

A decoder whose layers read its residual stream through RMSNorms, and only add to it, computes the
same in any orthonormal basis of the stream: the norms' weights, but for one number each, are
multiplied into the matrices behind them, those that read are multiplied by the basis, and those
that write by its transpose (SliceGPT, arXiv:2401.15024, section 3.2; a random basis: QuaRot,
arXiv:2404.00456, section 4). The values of each head get one of their own, between the value and
the output projection. In a random basis no input stands out among those of a token, which int8 and
scales of groups gain by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
# That are run before and after.
_TOKENS = 64
# How far logits may move, in units of their own size, by rounding alone.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 0.1


@torch.no_grad()
def rotate(model: PreTrainedModel, *, seed: int = 0) -> float:
    """Puts a model's residual stream, and the values of its heads, into a random basis, for good.

    It computes what it did, is of the same class, and every program runs it; its embedding and its
    head are no longer tied. Load the result, with a `BitLabConfig`, to make it ternary.

    Args:
        model: A model in full precision, of a kind among `KINDS`; changed in place.
        seed: Of the basis.

    Returns:
        How far the logits of random tokens moved: the root mean square of the difference over
        theirs. It is rounding of the weights' dtype.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: It is of another kind, or has weights that this kind should not have: it is
            as it was. Or it computes something else than before, and must be loaded again.
        LifecycleError: It is quantized: rotate the model that it is made of. It is as it was.
    """
    _check(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=generator)
    before = _logits(model, ids)
    _rotate_heads(model, generator)
    _rotate_stream(model, _random_basis(model.config.hidden_size, generator).to(model.device))
    difference = float((_logits(model, ids) - before).norm() / before.norm())
    if not difference <= _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT):
        raise ArgumentError(
            f"rotate: {type(model).__name__} must compute what it did, got logits that differ by "
            f"{difference:.1e} of their size\nLoad it again, and calibrate it as it is."
        )
    return difference


def _check(model: Any) -> None:
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
    if quantized_layers(model) or getattr(model, "hf_quantizer", None) is not None:
        raise LifecycleError(
            "rotate: model must be in full precision, got a quantized one\n"
            "Rotate the model that it is made of, and load the result with a BitLabConfig."
        )
    known = {*_READERS, *_INNER, _OUTPUT, _DOWN}.union(*_READERS.values())
    for layer in _layers(model):
        for name, _ in layer.named_parameters():
            if name.rpartition(".")[0] not in known:
                raise ArgumentError(
                    f"rotate: the layers of a {kind} model must hold no weights but their norms "
                    f"and linear layers, got {name}\nCalibrate it as it is."
                )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float()


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
        # Their size stays in the norm: learning rates that suit the model go on suiting it.
        size = norm.weight.double().square().mean().sqrt()
        scale = norm.weight.double() / size
        for reader in readers:
            _change(reader.weight, partial(lambda scale, rows: (rows * scale) @ basis, scale))
        norm.weight.fill_(size)
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
