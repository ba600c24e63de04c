"""Experts that are packed at load one by one, as a file gives them.

Hub files hold one matrix an expert, which transformers puts together before anything is done with
them: all experts of a layer in float, twice. Where a file's tensors are the model's expert by
expert, these converters take one expert's after the other instead, and it is packed before the next
one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    log_conversion_errors,
)

from bitlab_hf.model.packing import PackAtLoad


class ExpertConverter(WeightConverter):
    """A converter whose operations can be done for one expert at a time; what is not to be packed
    it converts as ever.
    """

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        """Packs what was collected into the model's experts; returns what is left to be set."""
        packing: Any = self.quantization_operation
        collected: dict[str, list[Any]] = self.collected_tensors
        counts = {len(parts) for parts in collected.values()}
        read_later = all(callable(part) for parts in collected.values() for part in parts)
        whole = set(collected) == set(self.source_patterns) and len(counts) == 1
        if not (isinstance(packing, PackAtLoad) and packing.has_experts(layer_name)) or not (
            whole and read_later
        ):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        parts = dict(collected)
        collected.clear()
        missing = None if loading_info is None else loading_info.missing_keys
        with log_conversion_errors(layer_name, loading_info, layer_name, packing):
            packing.pack_experts(layer_name, self._matrices(parts, counts.pop()), missing)
        return {}

    def _matrices(
        self, parts: dict[str, list[Callable[[], Tensor]]], experts: int
    ) -> Iterator[Tensor]:
        """Yields each expert's matrix as the model holds it."""
        for number in range(experts):
            tensors: Any = {name: [held[number]()] for name, held in parts.items()}
            for operation in self.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                )
            yield tensors[self.target_patterns[0]][0]


def by_expert(conversions: list[Any]) -> list[Any]:
    """Returns a model's conversions, those of experts in a form that can go expert by expert."""
    return [_of_experts(one) if _can_part(one) else one for one in conversions]


def _can_part(conversion: Any) -> bool:
    """Tells whether a conversion stacks matrices, and does nothing else across experts."""
    if type(conversion) is not WeightConverter or len(conversion.target_patterns) != 1:
        return False
    first, *others = conversion.operations
    return (
        type(first) is MergeModulelist
        and first.dim == 0
        and all(type(one) is Concatenate and one.dim > 0 for one in others)
    )


def _of_experts(converter: WeightConverter) -> ExpertConverter:
    made = ExpertConverter(
        converter._original_source_patterns,
        converter._original_target_patterns,
        converter.operations,
        converter.force_cpu,
    )
    made.scope_prefix = converter.scope_prefix
    made.base_model_prefix = converter.base_model_prefix
    return made
