"""What embeddings with quantized rows share: what stands behind the rows that they look up."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from bitcore.checks import check_float
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlayers.quantized import TypedModule


class QuantizedEmbedding(TypedModule, nn.Embedding):
    """An embedding whose rows are codes times scale, rounded once to ``dtype``.

    Args:
        num_embeddings: V.
        embedding_dim: K.
        padding_idx: As in ``nn.Embedding``; nothing trains, so it changes nothing here.
        embed_scale: What rows are multiplied with after that rounding.
        rounds_scale: Whether it is itself rounded to ``dtype`` first (Gemma's embeddings do so,
            BART's do not).
        dtype: dtype of the output; follows ``module.to(dtype)``.

    Attributes:
        dtype: dtype of the output and of `weight`.
        float_class: The class that this module replaces.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        dtype: torch.dtype | None = None,
        rounds_scale: bool = True,
    ) -> None:
        # On the meta device the float weight costs nothing.
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device="meta")
        self.embed_scale, self.rounds_scale = embed_scale, rounds_scale
        self.float_class: type[nn.Embedding] = nn.Embedding
        self._set_dtype(dtype or torch.get_default_dtype())

    @classmethod
    def _in_place_of(
        cls, embedding: nn.Embedding, embed_scale: float | None, rounds_scale: bool, **fields: Any
    ) -> Self:
        """Returns an empty module for an embedding's place; the arguments are `skeleton`'s."""
        check_embedding(cls.__name__, embedding, embed_scale)
        # Where the tensors are made, which this class has none of.
        fields["device"] = embedding.weight.device
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            1.0 if embed_scale is None else embed_scale,
            dtype=embedding.weight.dtype,
            rounds_scale=rounds_scale,
            **fields,
        )
        module.float_class = type(embedding)
        return module.train(embedding.training)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        super()._set_dtype(dtype)
        rounded = torch.tensor(self.embed_scale, dtype=dtype, device="cpu").item()
        self._factor = rounded if self.rounds_scale else self.embed_scale

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _scaled(self, rows: Tensor) -> Tensor:
        """Returns rows of ``dtype`` as the float class does."""
        return rows if self._factor == 1.0 else rows * self._factor

    def extra_repr(self) -> str:
        """Returns what ``repr`` shows: sizes, padding, output dtype."""
        factor = "" if self.embed_scale == 1.0 else f", embed_scale={self.embed_scale:g}"
        return f"{nn.Embedding.extra_repr(self)}{factor}, dtype={self.dtype}"


def check_embedding(op: str, embedding: nn.Module, embed_scale: float | None) -> None:
    """Checks that an embedding can be replaced by one with quantized rows.

    Args:
        op: Who asks, for error messages.
        embedding: The embedding.
        embed_scale: What it multiplies its rows with; None for a plain ``nn.Embedding``.

    Raises:
        ArgumentTypeError: It is no ``nn.Embedding``, a subclass without an embed_scale, or has
            another dtype than float of 16 or 32 bits.
        ArgumentError: It has a max_norm, which changes the weight at each use.
    """
    plain = type(embedding) is nn.Embedding
    if not isinstance(embedding, nn.Embedding) or (embed_scale is None and not plain):
        raise ArgumentTypeError(
            f"{op}: embedding must be a plain nn.Embedding, or one that only scales its rows, got "
            f"{type(embedding).__name__}"
        )
    if embedding.max_norm is not None:
        raise ArgumentError(f"{op}: embedding must have no max_norm, got {embedding.max_norm}")
    check_float(op, "embedding.weight", embedding.weight)
