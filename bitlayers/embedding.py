"""An embedding with ternary rows, four to a byte, of which only those looked up are unpacked.

It has no latent form: nothing here trains. What is loaded is ternary already, such as the embedding
of a model that was trained ternary, and a head that is tied to it is a `BitLinear` that holds the
same tensors.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from bitcore.checks import check_devices
from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.lookup import lookup_rows
from bitlayers.checks import check_sizes, load_problem
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.state import LayerState, Packed


class TernaryEmbedding(QuantizedEmbedding, LayerState):
    """An embedding in the packed format of `BitLinear`: rows of codes times scale, in ``dtype``.

    It is deployed from the start, and holds no data until `commit` or a loader gives it some.

    Args:
        num_embeddings: V.
        embedding_dim: K.
        padding_idx, embed_scale, rounds_scale, dtype: See `QuantizedEmbedding`.
        quant_config: How rows are scaled; its activations are those of a head that is tied to it.
            Default `BitQuantConfig()`.
        device: Where the tensors are made, empty.

    Attributes:
        qweight: uint8 [ceil(V / 4), K], a Parameter that does not train.
        qweight_scale: float32 [1] or [V] (with groups' float32 scales [V, K / G]).
        qweight_multiplier: uint8 [V, K / G] with groups.
        weight: A view of codes times scale.

    Raises:
        ArgumentError: Groups do not divide K, or K is above 131071.
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
        quant_config: BitQuantConfig | None = None,
    ) -> None:
        config = BitQuantConfig() if quant_config is None else quant_config
        check_sizes(type(self).__name__, embedding_dim, num_embeddings, config)
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, embed_scale, dtype, rounds_scale
        )
        self.quant_config, self.bias = config, None
        self.in_features, self.out_features = embedding_dim, num_embeddings
        self._is_deployed = True
        self._commit(
            *(
                torch.empty(shape, dtype=kind, device=device)
                for kind, shape in self.packed_tensors().values()
            )
        )

    @classmethod
    def skeleton(
        cls,
        embedding: nn.Embedding,
        quant_config: BitQuantConfig | None = None,
        embed_scale: float | None = None,
        rounds_scale: bool = True,
    ) -> Self:
        """Returns an empty module of the sizes, device and output dtype of an embedding.

        Args:
            embedding: An ``nn.Embedding``. Of a subclass the caller knows that all it does is to
                multiply rows with a factor.
            quant_config: How rows are scaled.
            embed_scale: That factor; None for a plain ``nn.Embedding``.
            rounds_scale: Whether it is rounded first.

        Raises:
            ArgumentTypeError, ArgumentError: See `bitlayers.lookup.check_embedding`.
        """
        return cls._in_place_of(embedding, embed_scale, rounds_scale, quant_config=quant_config)

    def commit(
        self, qweight: Tensor, qweight_scale: Tensor, qweight_multiplier: Tensor | None = None
    ) -> Self:
        """Takes these tensors as they are; a Parameter is shared with the module that holds it.

        Args:
            qweight: uint8 [ceil(V / 4), K].
            qweight_scale: float32 [1], [V] or [V, K / G].
            qweight_multiplier: uint8 [V, K / G] beside a scale [V], or None.

        Raises:
            ArgumentTypeError, ArgumentError: A dtype or shape is not what quant_config asks for.
        """
        given = [qweight, qweight_scale]
        given += [] if qweight_multiplier is None else [qweight_multiplier]
        wanted = self.packed_tensors()
        if len(given) != len(wanted):
            raise ArgumentError(
                f"{type(self).__name__}: tensors must be {', '.join(wanted)} for "
                f"{self.quant_config.granularity} weights, got {len(given)} of them"
            )
        for tensor, (leaf, (dtype, shape)) in zip(given, wanted.items(), strict=True):
            if tensor.dtype != dtype:
                raise ArgumentTypeError(
                    f"{type(self).__name__}: {leaf} must be {dtype}, got {tensor.dtype}"
                )
            if tuple(tensor.shape) != shape:
                raise ArgumentError(
                    f"{type(self).__name__}: {leaf} must be {list(shape)}, got {list(tensor.shape)}"
                )
        return self._commit(*given)

    def _commit(self, qweight: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> Self:
        if not isinstance(qweight, nn.Parameter):
            qweight = nn.Parameter(qweight, requires_grad=False)
        # Not `del`: `weight` is a view from here on.
        self.register_parameter("weight", None)
        self.register_parameter("qweight", qweight)
        self.register_buffer("qweight_scale", scale)
        if multiplier is not None:
            self.register_buffer("qweight_multiplier", multiplier)
        return super().train(False)

    def packed(self) -> Packed:
        """Returns ``(qweight, qweight_scale)``, with scales of groups in two levels also
        ``qweight_multiplier``.
        """
        # Not by attribute: nn.Module's look-up costs as much as a small layer.
        packed = self._parameters["qweight"], self._buffers["qweight_scale"]
        multiplier = self._buffers.get("qweight_multiplier")
        return cast(Packed, packed if multiplier is None else (*packed, multiplier))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Embedding's name for it)
        """Looks rows up: input int [...]; returns [..., embedding_dim] of ``dtype``.

        Raises:
            IndexError: A number is not that of a row.
        """
        qweight, scale, *multiplier = self.packed()
        # With indices on the meta device torch would give uninitialized memory.
        check_devices("TernaryEmbedding", input, qweight, scale)
        rows = lookup_rows(input, qweight, scale, self.num_embeddings, self.dtype, *multiplier)
        return self._scaled(rows)

    def train(self, mode: bool = True) -> Self:
        """Leaves the module in eval mode: it is deployed."""
        return super().train(False)

    def extra_repr(self) -> str:
        """Returns what ``repr`` shows: sizes, padding, output dtype, scheme."""
        group = f", group_size={self.quant_config.group_size}" * bool(self.quant_config.group_size)
        shown = super().extra_repr()
        return f"{shown}, weight={self.quant_config.weight_granularity}{group}"

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
        problem = load_problem(self, state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
