"""What is done along a plan: modules swapped before the weights, finished and verified after."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError, ConfigError
from bitcore.ops import find_invalid_code
from bitlab_hf.checkpoint.aligned import realign
from bitlab_hf.checkpoint.experts import check_packed_experts
from bitlab_hf.checkpoint.headers import (
    FLOATS,
    Checkpoint,
    TensorHeader,
    check_headers,
    check_no_multiplier,
)
from bitlab_hf.checkpoint.plan import Plan
from bitlab_hf.checkpoint.verified import Verification
from bitlab_hf.model.embedding import swap_embeddings
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.int8 import finish, int8_modules, is_borrower, swap_skeletons
from bitlab_hf.model.learned import (
    deploy_learned,
    expect_learned_scales,
    expect_sub_norms,
    start_fresh,
)
from bitlab_hf.model.marks import retie_packed, scales_of, tied_groups
from bitlab_hf.model.packing import PackAtLoad
from bitlab_hf.model.parts import cut, cut_experts
from bitlab_hf.model.replace import OwnTensors, swap_latent, swap_packed
from bitlab_hf.model.schemes import check_names
from bitlab_hf.model.tree import Found, quantized_layers, ternary_modules
from bitlayers import learned_experts
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.checks import (
    int8_problem,
    multiplier_problem,
    packed_problem,
    scales_are_valid,
)
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Rows
from bitlayers.registry import get_layer
from bitlayers.rmsnorm import InputRMSNorm
from bitlayers.state import LayerState, Packed

_SAFETENSORS_NAMES = {torch.uint8: "U8", torch.float32: "F32"}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Loading:
    """A load under way: the plan, and what waits for the weights.

    Args:
        plan: What each module becomes.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.packing = PackAtLoad()
        self._unlearned: list[BitLayerBase | BitExperts] = []
        self._fresh_norms: list[InputRMSNorm] = []
        self._verification: Verification | None = None

    # Before the weights.

    def swap(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Puts the plan's modules into the skeleton.

        Args:
            model: The skeleton.
            dtype: The dtype that the model is loaded in.

        Raises:
            CheckpointError: A tensor is missing, or has another dtype or shape than its module.
            ConfigError: A layer cannot be quantized as asked, or a new head not be int8.
        """
        plan = self.plan
        if plan.source.is_packed:
            self._verification = self._begin_verification()
            self._swap_packed(model)
        else:
            if not plan.source.was_converted:
                check_names(model, plan.layers, plan.config)
            swap_latent(model, plan.layers, plan.config, plan.experts)
            self._unlearned = expect_learned_scales(model, self._learned_scales())
            if plan.source.builds_packed:
                self._expect_floats(model, dtype)
        self._fresh_norms = expect_sub_norms(
            model, self._holds("rms_norm.weight"), plan.source.was_converted
        )

    def _begin_verification(self) -> Verification | None:
        plan = self.plan
        if not plan.config.verify or plan.checkpoint is None:
            return None
        named = [found.names for found in plan.layers]
        named += [found.names for found in plan.experts]
        named += [rows.names for rows in plan.int8]
        named += [] if plan.embedding is None else [plan.embedding.names]
        scanned = sorted(name for names in named for name in names)
        verification = Verification(plan.checkpoint.files, scanned)
        if not verification.is_known:
            verification.read_ahead()
        return verification

    def _learned_scales(self) -> set[str] | None:
        """Returns the names of the learned scales that the files hold; None if unknown."""
        checkpoint = self.plan.checkpoint
        if checkpoint is None:
            return None if self.plan.source.was_converted else set()
        return {name for name in checkpoint.tensors if name.endswith("learned_scale")}

    def _holds(self, leaf: str) -> set[str] | None:
        """Returns the names of the modules of which the files hold a tensor; None if unknown."""
        checkpoint = self.plan.checkpoint
        if checkpoint is None:
            return None if self.plan.source.was_converted else set()
        end = f".{leaf}"
        return {name.removesuffix(end) for name in checkpoint.tensors if name.endswith(end)}

    def _swap_packed(self, model: PreTrainedModel) -> None:
        plan = self.plan
        assert plan.checkpoint is not None
        own = {
            found.names[0]: tensors
            for found in plan.layers
            if (tensors := self._own_tensors(found.names, plan.stored(found.names)))
        }
        swap_packed(model, plan.layers, plan.config, own, plan.experts)
        for experts in expert_modules(model):
            check_packed_experts(experts, plan.checkpoint)
        for rows in plan.int8:
            swap_skeletons(model, rows)
        if plan.embedding is not None:
            swap_embeddings(model, plan.embedding, plan.config)
        for found in ternary_modules(model):
            layer = found.module
            if layer.packs_itself:
                continue
            wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
                leaf: ((_SAFETENSORS_NAMES[dtype],), shape)
                for leaf, (dtype, shape) in layer.packed_tensors().items()
            }
            if layer.bias is not None:
                wanted["bias"] = (FLOATS, (layer.out_features,))
            _check_levels(found, plan.checkpoint)
            what = f"{layer.quant_config.granularity} weights"
            check_headers(found.names, wanted, plan.checkpoint, what)
        retie_packed(model, set(plan.stored_apart))
        for name in plan.borrowers:
            # A loader would miss it; the qweight it ties.
            holder, scales = scales_of(model, name)
            holder._buffers.update(dict.fromkeys(scales))
        ignore_unexpected(model, plan.checkpoint.sentinels())

    def _own_tensors(self, names: list[str], stored: dict[str, TensorHeader]) -> OwnTensors | None:
        """Returns the tensors of a layer that packed itself; None of any other."""
        kind = get_layer(self.plan.config.layer_name(*names))
        if kind._perform_deployment in (BitLinear._perform_deployment,):
            return None
        if {"qweight", "qweight_scale"} <= stored.keys() and stored["qweight"].dtype == "U8":
            return None
        unknown = {header.dtype for header in stored.values()} - _DTYPES.keys()
        if unknown:
            raise CheckpointError(
                f"{names[0]} must be stored in dtypes that torch has, got {sorted(unknown)}"
            )
        return {leaf: (_DTYPES[item.dtype], item.shape) for leaf, item in stored.items()}

    def _expect_floats(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Prepares packing of what arrives: checked by its headers, in the file's own dtype."""
        checkpoint = self.plan.checkpoint
        # Patterns, of which one that is not anchored would match longer names, such as a bias's.
        keep = set(model._keep_in_fp32_modules_strict or ())
        layers = [f for f in quantized_layers(model) if f.module.learned_scale is None]
        for tied in tied_groups(model, layers):
            self.packing.add_layers(tied)
        for found in layers:
            shape = (found.module.out_features, found.module.in_features)
            for name in (f"{name}.weight" for name in found.names):
                header = checkpoint.tensors.get(name) if checkpoint else None
                if header is not None:
                    _check_float_header(name, header, shape)
                unknown = checkpoint is None or (header is not None and header.dtype == "F32")
                if unknown and dtype != torch.float32:
                    # transformers would round it to the model's dtype before packing.
                    keep.add(f"^{re.escape(name)}$")
        # Where learned scales arrive beside weights, packing has to wait for both.
        unlearned = [one for one in self._unlearned if isinstance(one, BitExperts)]
        experts = [
            one
            for one in expert_modules(model)
            if one.module in unlearned or not learned_experts.names(one.module)
        ]
        for group in tied_groups(model, experts):
            self.packing.add_experts(group)
        for one in experts:
            for name in (f"{name}.{leaf}" for name in one.names for leaf in one.module.stacks):
                header = checkpoint.tensors.get(name) if checkpoint else None
                if dtype != torch.float32 and (header is None or header.dtype == "F32"):
                    keep.add(f"^{re.escape(name)}$")
        for rows in self.plan.int8:
            # Quantized from the model's dtype, as `deploy` does it.
            self.packing.add_int8(rows)
            if checkpoint is None:
                continue
            names = [f"{name}.weight" for name in rows.names]
            held = [name for name in names if name in checkpoint.tensors]
            if not held:
                # A new layer would not be among them.
                raise ConfigError(
                    f'bitlab: head="int8" must find {names[0]} in the checkpoint, got a new head\n'
                    'Load it latent with head="int8", then call deploy(model).'
                )
            for name in held:
                shape = (rows.tensor.shape[0], rows.tensor.shape[1])
                _check_float_header(name, checkpoint.tensors[name], shape)
        model._keep_in_fp32_modules_strict = keep

    # After the weights.

    def finish(self, model: PreTrainedModel) -> None:
        """Makes whole what was loaded, and verifies it.

        Raises:
            CheckpointError: A weight did not arrive, or holds what no writer produces.
            NonFiniteError: A weight that was to be packed holds NaN or infinity.
        """
        start_fresh(self._unlearned, self._fresh_norms)
        if not self.plan.source.builds_packed:
            return
        self.packing.check()
        for name, owner in self.plan.borrowers.items():
            (holder, scales), (lender, held) = scales_of(model, name), scales_of(model, owner)
            pairs = zip(scales, held, strict=True)
            holder._buffers.update({leaf: lender._buffers[lent] for leaf, lent in pairs})
        layers = quantized_layers(model)
        deploy_learned(layers, expert_modules(model))
        for found in layers:
            layer = found.module
            if not layer.is_deployed:
                raise CheckpointError(
                    f"{found.names[0]}.weight must be in the checkpoint to be packed, got none"
                )
            for parameter in (layer._parameters.get("qweight"), layer.bias):
                if parameter is not None:
                    parameter.requires_grad_(False)
        experts = expert_modules(model)
        for one in experts:
            lost = [leaf for leaf in one.module.stacks if not one.module.is_packed(leaf)]
            if lost:
                raise CheckpointError(
                    f"{one.names[0]}.{lost[0]} must be in the checkpoint to be packed, got none"
                )
            for parameter in one.module.parameters(recurse=False):
                parameter.requires_grad_(False)
        for rows in self.plan.int8:
            if not isinstance(rows.members[0].module, Int8Rows):
                raise CheckpointError(
                    f"{rows.owner}.weight must be in the checkpoint to be quantized, got none"
                )
        finish(model, self.plan.int8)
        if self.plan.source.is_packed:
            realign(model)
        known = self._verification
        if known is not None and not (known.is_known and known.is_same()):
            verify_packed(ternary_modules(model))
            verify_experts(experts)
            verify_int8(model)
            if not any(one.is_meta for one in model.parameters()):
                known.keep()
        retie_packed(model, set(self.plan.stored_apart))
        for found in layers:
            cut(found.module)
        for one in experts:
            cut_experts(one.module)


def _check_levels(found: Found[LayerState], known: Checkpoint) -> None:
    """Checks that a layer's tensors have scales in as many levels as its configuration says."""
    layer, name = found.module, f"{found.names[0]}.qweight_multiplier"
    granularity = layer.quant_config.granularity
    if granularity != "per_group":
        check_no_multiplier(found.names, known, f"{granularity} weights")
    elif not any(f"{one}.qweight_multiplier" in known.tensors for one in found.names):
        scale = known.leaves(found.names).get("qweight_scale")
        if scale is not None and scale.shape == layer.estimated_shape():
            raise CheckpointError(
                f"{name} must be in the checkpoint for per_group weights, got none beside a scale "
                "for each group\nThe tensors are of format_version 1, config.json is of 2; take "
                "both from one checkpoint."
            )


def _check_float_header(name: str, header: TensorHeader, shape: tuple[int, int]) -> None:
    """Checks a float weight that is to be packed; of one that is fused or split, its dtype."""
    if header.dtype in FLOATS and (header.converted or header.shape == shape):
        return
    raise CheckpointError(
        f"{name} must be float32, bfloat16 or float16 {list(shape)} to be packed, "
        f"got {header.dtype} {list(header.shape)}"
    )


def ignore_unexpected(model: PreTrainedModel, names: list[str]) -> None:
    """Adds keys that a load may find without a word."""
    patterns = {f"^{re.escape(name)}$" for name in names}
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    attributes: Any = model
    attributes._keys_to_ignore_on_load_unexpected = known | patterns


def verify_packed(layers: list[Found[LayerState]]) -> None:
    """Scans packed tensors for what no writer produces.

    Raises:
        CheckpointError: A qweight holds the code 3, a scale is not a finite positive number, or
            multipliers are above 127 or all 0 in a row.
    """
    packed: dict[int, tuple[str, Packed]] = {}
    for found in layers:
        if not found.module.packs_itself:
            tensors = found.module.packed()
            # What is tied is scanned once, under the name that the file has.
            packed.setdefault(id(tensors[0]), (found.names[0], tensors))
    held = [(name, tensors) for name, tensors in packed.values() if not tensors[0].is_meta]
    invalid = find_invalid_code([tensors[0] for _, tensors in held])
    if invalid is not None:
        raise CheckpointError(
            f"{held[invalid][0]}.qweight must hold the codes 0, 1 and 2, got the invalid code 3\n"
            "The file is damaged; fetch or write it again."
        )
    for name, (_, scale, *multipliers) in held:
        if not scales_are_valid(scale):
            raise CheckpointError(
                f"{name}.qweight_scale must be finite and positive, got other values\n"
                "The file is damaged; fetch or write it again."
            )
        for multiplier in multipliers:
            problem = multiplier_problem(multiplier)
            if problem is not None:
                raise CheckpointError(
                    f"{name}.qweight_multiplier {problem}\nFetch or write the file again."
                )


def verify_experts(experts: list[Found[BitExperts]]) -> None:
    """Scans packed tensors of experts for what no writer produces.

    Raises:
        CheckpointError: As `verify_packed`; the message names the module and the expert.
    """
    for found in experts:
        for name in found.module.stacks:
            held = found.module.packed_stack(name)
            problem = None if held["qweight"].is_meta else packed_problem(held)
            if problem is not None:
                leaf, expert, what = problem
                raise CheckpointError(
                    f"{found.names[0]}.{name}_{leaf} of expert {expert} {what}\n"
                    "The file is damaged; fetch or write it again."
                )


def verify_int8(model: PreTrainedModel) -> None:
    """Scans int8 tensors for what no writer produces.

    Raises:
        CheckpointError: A qweight holds -128, or a scale is not a finite positive number.
    """
    for found in int8_modules(model):
        if is_borrower(model, found):
            continue
        problem = int8_problem(
            f"{found.names[0]}.", found.module.qweight, found.module.qweight_scale
        )
        if problem is not None:
            raise CheckpointError(f"{problem}\nThe file is damaged; fetch or write it again.")
