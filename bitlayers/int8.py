"""A linear layer and an embedding in int8, with one float32 scale for each row.

They hold what a model's output head, and the embedding tied to it, become once deployed: the head
of a large vocabulary costs more in 16 bits than the whole ternary body. Both are built from a float
module, or empty for a loader to fill; nothing in them trains, but the linear layer passes gradients
to its input. Two of them can share one ``qweight``.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import ops
from bitcore.checks import check_devices, check_in_features, check_int8
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.quantize import dequantize_rows_int8, quantize_rows_int8
from bitlayers.checks import int8_problem
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.quantized import TypedModule


class Int8Rows(TypedModule):
    """What both modules share: ``qweight`` int8 [V, K], ``qweight_scale`` float32 [V], no weight.

    Attributes:
        qweight: int8 [V, K] with codes of -127 to 127, a Parameter that does not train.
        qweight_scale: float32 [V], finite and positive; multiplies codes.
        dtype: dtype of the float weight that they stand for; follows ``module.to(dtype)``.
        weight: A view of codes times scale in it, see `bitlayers.quantized.QuantizedModule`.
    """

    def commit(self, qweight: Tensor, qweight_scale: Tensor) -> Self:
        """Takes these tensors as they are; a Parameter is shared with the module that holds it.

        Args:
            qweight: int8 [V, K].
            qweight_scale: float32 [V].

        Raises:
            ArgumentTypeError, ArgumentError: A dtype or shape is wrong.
        """
        name = type(self).__name__
        check_int8(name, qweight, qweight_scale)
        expected = self._weight_shape()
        if tuple(qweight.shape) != expected:
            raise ArgumentError(
                f"{name}: qweight must be {list(expected)}, got {list(qweight.shape)}"
            )
        if not isinstance(qweight, nn.Parameter):
            qweight = nn.Parameter(qweight, requires_grad=False)
        # Not `del`: `weight` is a view from here on.
        self.register_parameter("weight", None)
        self.register_parameter("qweight", qweight)
        self.register_buffer("qweight_scale", qweight_scale)
        return self

    def _tensors(self) -> tuple[Tensor, Tensor]:
        # Not by attribute: nn.Module's look-up costs as much as a small layer.
        tensors = self._parameters["qweight"], self._buffers["qweight_scale"]
        return cast(tuple[Tensor, Tensor], tensors)

    def _commit_empty(self, device: torch.device | str | None) -> None:
        rows, columns = self._weight_shape()
        self.commit(
            torch.empty(rows, columns, dtype=torch.int8, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns codes times scale, [V, K] of dtype (default float32)."""
        return dequantize_rows_int8(self.qweight, self.qweight_scale, dtype or torch.float32)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = None
        if prefix + "weight" in state_dict:
            problem = (
                f"{prefix}weight is float, but the module is int8; load it into a float model "
                "and call deploy() again"
            )
        found = [state_dict.get(prefix + name) for name in ("qweight", "qweight_scale")]
        for name, tensor in zip(("qweight", "qweight_scale"), found, strict=True):
            own = getattr(self, name)
            if tensor is not None and tensor.dtype != own.dtype:
                problem = f"{prefix}{name} must be {own.dtype}, got {tensor.dtype}"
        problem = problem or int8_problem(prefix, *found)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Int8Linear(Int8Rows, nn.Linear):
    """``y = (x_q @ qweight.T) * (x_scale * qweight_scale) + bias``: int8 weights, exact sums.

    Activations are quantized to int8 per token, as in `BitLinear`. Gradients reach x, and a
    bias that is set to train.

    Args:
        in_features: K, at most 131071.
        out_features: V.
        bias: Whether the layer has a bias.
        device: Where the tensors are made, empty.
        dtype: dtype of the bias and of `weight`.

    Raises:
        ArgumentError: in_features is too large.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_in_features("Int8Linear", in_features)
        # On the meta device the float weight costs nothing.
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.dtype = dtype or torch.get_default_dtype()
        self._commit_empty(device)
        if bias:
            self.bias = nn.Parameter(torch.empty_like(self.bias, device=device), False)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def skeleton(cls, linear: nn.Linear) -> Self:
        """Returns an empty module of the sizes of a linear layer, on its device, with its bias.

        Raises:
            ArgumentTypeError: linear is no plain ``nn.Linear``.
        """
        if type(linear) is not nn.Linear:
            raise ArgumentTypeError(
                f"{cls.__name__}: linear must be a plain nn.Linear, got {type(linear).__name__}"
            )
        weight = linear.weight
        rows, columns = weight.shape
        module = cls(columns, rows, False, weight.device, weight.dtype)
        module.bias = linear.bias
        if module.bias is not None:
            module.bias.requires_grad_(False)
        return module.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Returns the int8 form of a linear layer, which shares its bias.

        Raises:
            ArgumentTypeError: linear is no plain ``nn.Linear``, or not of a float dtype of 16 or
                32 bits.
        """
        module = cls.skeleton(linear)
        return module.commit(*quantize_rows_int8(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., in_features]; returns [..., out_features]."""
        return ops.linear_int8(x, *self._tensors(), self._parameters["bias"])


class Int8Embedding(Int8Rows, QuantizedEmbedding):
    """An embedding in int8: row ``qweight[i] * qweight_scale[i]``, rounded once to ``dtype``.

    Args:
        num_embeddings, embedding_dim, padding_idx, embed_scale, dtype, rounds_scale: See
            `QuantizedEmbedding`.
        device: Where the tensors are made, empty.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rounds_scale: bool = True,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, embed_scale, dtype, rounds_scale
        )
        self._commit_empty(device)

    @classmethod
    def skeleton(
        cls, embedding: nn.Embedding, embed_scale: float | None = None, rounds_scale: bool = True
    ) -> Self:
        """Returns an empty module of the sizes, device and output dtype of an embedding.

        Args:
            embedding: An ``nn.Embedding``. Of a subclass the caller knows that all it does is to
                multiply rows with a factor.
            embed_scale: That factor; None for a plain ``nn.Embedding``.
            rounds_scale: Whether it is rounded first.

        Raises:
            ArgumentTypeError, ArgumentError: See `bitlayers.lookup.check_embedding`.
        """
        return cls._in_place_of(embedding, embed_scale, rounds_scale)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, embed_scale: float | None = None, rounds_scale: bool = True
    ) -> Self:
        """Returns the int8 form of an embedding; arguments and errors are `skeleton`'s."""
        module = cls.skeleton(embedding, embed_scale, rounds_scale)
        return module.commit(*quantize_rows_int8(embedding.weight))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Embedding's name for it)
        """Looks rows up: input int [...]; returns [..., embedding_dim] of ``dtype``."""
        qweight, scale = self._tensors()
        # With indices on the meta device torch would give uninitialized memory.
        check_devices("Int8Embedding", input, qweight, scale)
        codes = F.embedding(input, qweight).float()
        return self._scaled((codes * scale[input].unsqueeze(-1)).to(self.dtype))
