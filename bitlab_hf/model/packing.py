"""Packing at load: what happens to the weights of a float file that is loaded to be run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from bitcore.errors import ArgumentError, CheckpointError, NonFiniteError
from bitcore.estimators import check_scales
from bitcore.quantize import quantize_rows_int8
from bitlab_hf.model.int8 import swap_quantized
from bitlab_hf.model.marks import retie_packed
from bitlab_hf.model.rows import Rows
from bitlab_hf.model.tree import Found
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Rows
from bitlayers.stack import Stack


class PackAtLoad(ConversionOps):
    """Packs, or quantizes, each weight as it arrives from a float file.

    Attributes:
        nonfinite: Names of weights with NaN or infinity met on the way.
        differing: Names of weights that differ from one that they are tied to.
        refused: What was wrong with the scales that estimators gave.
    """

    def __init__(self) -> None:
        # Not raised on the way: transformers would make a RuntimeError of it.
        self.nonfinite: list[str] = []
        self.differing: list[str] = []
        self.refused: list[ArgumentError] = []
        # Every name of a weight to take, by each of its names.
        self._names: dict[str, set[str]] = {}
        self._tied: dict[str, list[BitLayerBase]] = {}
        self._int8: dict[str, Rows] = {}
        self._experts: dict[str, list[BitExperts]] = {}

    def add_experts(self, tied: list[Found[BitExperts]]) -> None:
        """Takes the tensors of latent experts, and of those that are tied to them."""
        for leaf in tied[0].module.stacks:
            names = {f"{name}.{leaf}" for found in tied for name in found.names}
            self._names.update(dict.fromkeys(names, names))
            modules = [found.module for found in tied]
            self._experts.update(dict.fromkeys(names, modules))

    def add_layers(self, tied: list[Found[BitLayerBase]]) -> None:
        """Takes the weight of a latent layer, and of those that are tied to it, under whichever of
        their names it arrives.
        """
        names = {f"{name}.weight" for found in tied for name in found.names}
        self._names.update(dict.fromkeys(names, names))
        modules = [found.module for found in tied]
        self._tied.update(dict.fromkeys(names, modules))

    def add_int8(self, rows: Rows) -> None:
        """Takes the weight of what becomes int8 and of what is tied to it."""
        names = {f"{name}.weight" for name in rows.names}
        self._names.update(dict.fromkeys(names, names))
        self._int8.update(dict.fromkeys(names, rows))

    def is_int8(self, name: str) -> bool:
        """Tells whether a parameter is a weight that becomes int8."""
        return name in self._int8

    def takes(self, name: str) -> bool:
        """Tells whether a parameter is to be packed or quantized."""
        return name in self._names

    def check(self) -> None:
        """Says what was wrong with the weights that arrived.

        Raises:
            NonFiniteError: One held NaN or infinity.
            ArgumentError: An estimator gave scales that no file may have.
            CheckpointError: One differs from another that it is tied to.
        """
        if self.nonfinite:
            raise NonFiniteError(
                f"{self.nonfinite[0]} must be finite to be packed, got NaN or infinity"
                + (f" (and {len(self.nonfinite) - 1} more)" if len(self.nonfinite) > 1 else "")
            )
        if self.refused:
            raise self.refused[0]
        if self.differing:
            raise CheckpointError(
                f"{self.differing[0]} must have the values of the weight that it is tied "
                "to, got others\nSet tie_word_embeddings to false in config.json."
            )

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Packs each tensor into its module; what is not to be packed is transformers' to set.

        A file's fused matrix arrives split; of its parts some can be packed and others not.
        """
        rest: dict[str, list[Tensor]] = {}
        model: PreTrainedModel = kwargs["model"]
        missing_keys: set[str] | None = kwargs.get("missing_keys")
        for name, value in input_dict.items():
            if not self.takes(name):
                rest[name] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            if name in self._experts:
                stack = self._experts[name][0].stacks[name.rpartition(".")[2]]
                matrices = weight.detach().view(-1, *stack.matrix_shape) if stack.flat else weight
                self.pack_experts(name, matrices.detach(), missing_keys)
                continue
            pack = self._quantize_rows if self.is_int8(name) else self._pack_layer
            scale = pack(model, name, weight.detach())
            if not bool(torch.isfinite(scale).all()):
                self.nonfinite.append(name)
            if missing_keys is not None:
                # One module can stand under several names.
                missing_keys -= self._names.get(name, {name})
        return rest

    def _pack_layer(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        layer, *others = self._tied[name]
        if layer.is_deployed:
            return self._compare(name, weight, layer)
        for one in (layer, *others):
            one.weight = nn.Parameter(weight, requires_grad=False)
            try:
                built = one.build_deployment(name.removesuffix(".weight"))
            except ArgumentError as error:
                self.refused.append(error)
                return torch.ones(())
            if isinstance(built, tuple) and one is not layer:
                built = layer.packed()
            one.commit(built)
            if isinstance(built, tuple):
                # One Parameter for all: counted, moved and saved once.
                one.qweight = layer.qweight
            for tensor in (*one.parameters(), *one.buffers()):
                vars(tensor)["_is_hf_initialized"] = True
        if others:
            retie_packed(model, set())
        if layer.packs_itself:
            return torch.ones(())
        return layer.qweight_scale

    def has_experts(self, name: str) -> bool:
        """Tells whether a parameter is the tensor of latent experts."""
        return name in self._experts

    def pack_experts(
        self, name: str, matrices: Iterable[Tensor], missing_keys: set[str] | None
    ) -> None:
        """Packs the tensor of experts.

        Args:
            name: Of the parameter.
            matrices: Each expert's, as the model holds it; read one by one.
            missing_keys: Names of what has not arrived, from which it is taken.

        Raises:
            CheckpointError: An expert's has another shape, or there are more or less of them.
        """
        (module, *others), leaf = self._experts[name], name.rpartition(".")[2]
        stack = module.stacks[leaf]
        packed = stack.pack_all(_checked(name, matrices, stack))
        if module.is_packed(leaf):
            held = module.packed_stack(leaf).values()
            if not all(map(torch.equal, packed, held)):
                self.differing.append(name)
            return
        module.commit(leaf, *packed)
        for one in others:
            one.share(leaf, module)
        for tensor in module.packed_stack(leaf).values():
            vars(tensor)["_is_hf_initialized"] = True
        finite = torch.isfinite(module.packed_stack(leaf)["qweight_scale"]).flatten(1).all(1)
        self.nonfinite += [f"{name} of expert {int(one)}" for one in (~finite).nonzero()[:1]]
        try:
            if bool(finite.all()):
                check_scales(packed[1], None, stack.config.weight_quantizer, name)
        except ArgumentError as error:
            self.refused.append(error)
        if missing_keys is not None:
            missing_keys -= self._names[name]
            missing_keys -= {f"{one}_learned_scale" for one in self._names[name]}

    def _compare(self, name: str, weight: Tensor, layer: BitLayerBase) -> Tensor:
        """Takes a weight that is stored under a second name: it has to be the same one."""
        if layer.packs_itself:
            return torch.ones(())
        again = type(layer)(
            layer.in_features,
            layer.out_features,
            False,
            device="meta",
            quant_config=layer.quant_config,
        )
        again.weight = nn.Parameter(weight, requires_grad=False)
        packed = again.build_deployment()
        if not isinstance(packed, tuple) or not all(
            torch.equal(one, other) for one, other in zip(packed, layer.packed(), strict=True)
        ):
            self.differing.append(name)
        return layer.qweight_scale

    def _quantize_rows(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        rows = self._int8[name]
        qweight, scale = quantize_rows_int8(weight)
        built = rows.members[0].module
        if not isinstance(built, Int8Rows):
            swap_quantized(model, rows, qweight, scale)
        elif not torch.equal(built.qweight, qweight) or not torch.equal(built.qweight_scale, scale):
            self.differing.append(name)
        return scale


def _checked(name: str, matrices: Iterable[Tensor], stack: Stack) -> Iterator[Tensor]:
    """Yields each expert's matrix; there have to be as many as there are experts."""
    count = 0
    for matrix in matrices:
        if matrix.shape != stack.matrix_shape:
            raise CheckpointError(
                f"{name} must be {list(stack.shape)} to be packed, got {list(matrix.shape)} of "
                f"expert {count}"
            )
        count += 1
        if count <= stack.experts:
            yield matrix
    if count not in (stack.experts, stack.experts + stack.unused):
        raise CheckpointError(f"{name} must be of {stack.experts} experts, got {count}")
