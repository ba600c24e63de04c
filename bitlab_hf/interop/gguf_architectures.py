"""What llama.cpp computes for each architecture, and how a GGUF file says it.

A model is refused where llama.cpp would compute something else than transformers. A window of
attention that llama.cpp leaves out becomes the file's context: within it both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf.interop.gguf_types import ALTERNATIVES, file_type

if TYPE_CHECKING:
    import gguf

# What the files of mixtures do not say: whether the weights of the chosen experts are brought to a
# sum of 1, and that every layer is a mixture.
_EVERY: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
MIXED: dict[str, dict[str, Any]] = {
    "qwen2moe": {"norm_topk_prob": False, "qkv_bias": True, **_EVERY},
    "qwen3moe": {"norm_topk_prob": True, "attention_bias": False, **_EVERY},
    "olmoe": {"norm_topk_prob": False, "attention_bias": False, "clip_qkv": None},
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Gemma 3: every sixth layer looks at everything. SmolLM3: every fourth has no positions.
GEMMA_PERIOD, SMOLLM_PERIOD = 6, 4
# Layers of the one Gemma 3 that llama.cpp scales attention by the hidden size for.
_GEMMA_27B = 62


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: Its name there.
        activation: The one that it computes.
        ropes: transformers' types of rotary embeddings that it computes.
        pairs: Whether it rotates neighbouring pairs of a head's rows, not the two halves of a head.
        norm_shift: What it has in the weights of norms and transformers adds while computing.
    """

    name: str
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default",)
    pairs: bool = False
    norm_shift: float = 0.0


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", ropes=("default", "linear", "llama3"), pairs=True),
    "MistralForCausalLM": Architecture("llama", pairs=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "BitNetForCausalLM": Architecture("bitnet"),
    "Gemma3ForCausalLM": Architecture(
        "gemma3", "gelu_pytorch_tanh", ropes=("default", "linear"), norm_shift=1.0
    ),
    "Phi3ForCausalLM": Architecture("phi3"),
    "GraniteForCausalLM": Architecture("granite", pairs=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", pairs=True),
    "MixtralForCausalLM": Architecture("llama", pairs=True),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "OlmoeForCausalLM": Architecture("olmoe"),
    "GraniteMoeForCausalLM": Architecture("granitemoe", pairs=True),
}
BY_NAME = {known.name: known for known in reversed(ARCHITECTURES.values())}


def check_architecture(model: PreTrainedModel) -> Architecture:
    """Returns the architecture of a model that llama.cpp computes as transformers does.

    Raises:
        ArgumentError: There is none; the message names the field of the configuration.
    """
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        raise ArgumentError(
            f"export_gguf: the model must be one of {sorted(ARCHITECTURES)}, got {kind}"
            f"{ALTERNATIVES}"
        )
    known = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != known.activation:
        raise ArgumentError(
            f"export_gguf: hidden_act must be {known.activation!r}, the one that llama.cpp "
            f"computes for {known.name!r}, got {activation!r}{ALTERNATIVES}"
        )
    local = (config.rope_parameters or {}).get(_SLIDING, {})
    # Of layers with a window it scales nothing.
    for rope, allowed in ((rope_of(config), known.ropes), (local, ("default",))):
        found = rope.get("rope_type", "default")
        if found not in allowed:
            where = " where it looks at a window" if rope is local else ""
            raise ArgumentError(
                f"export_gguf: rope_type must be one of {allowed} for {kind}{where}, "
                f"got {found!r}{ALTERNATIVES}"
            )
    for name, required in _required(known.name, config).items():
        value = getattr(config, name, required)
        if value != required:
            raise ArgumentError(
                f"export_gguf: {name} must be {required!r:.200}, which llama.cpp computes for "
                f"{known.name!r}, got {value!r:.200}{ALTERNATIVES}"
            )
    return known


def _required(architecture: str, config: Any) -> dict[str, Any]:
    """Returns the values of the fields that llama.cpp does not ask a file for."""
    layers = config.num_hidden_layers
    required: dict[str, Any] = {"use_sliding_window": False}
    if architecture == "bitnet":
        # It has no head of its own there.
        required["tie_word_embeddings"] = True
    if architecture == "smollm3":
        required["no_rope_layers"] = rotating_layers(layers)
    if architecture in MIXED:
        required.update(MIXED[architecture])
    if architecture == "olmoe":
        # It norms queries and keys across all heads, of which it has as many.
        required["num_key_value_heads"] = config.num_attention_heads
    if architecture == "gemma3":
        across = config.hidden_size // config.num_attention_heads
        required.update(
            attn_logit_softcapping=None,
            use_bidirectional_attention=False,
            query_pre_attn_scalar=attention_scalar(layers, across, config.head_dim),
            layer_types=layer_types(layers),
        )
    return required


def rotating_layers(layers: int) -> list[int]:
    """Returns which layers of SmolLM3 have positions: 1, or 0 for none."""
    return [int((index + 1) % SMOLLM_PERIOD > 0) for index in range(layers)]


def layer_types(layers: int) -> list[str]:
    """Returns what each layer of Gemma 3 looks at."""
    return [_SLIDING if (index + 1) % GEMMA_PERIOD else _FULL for index in range(layers)]


def attention_scalar(layers: int, across: int, size: int) -> int:
    """Returns what Gemma 3 scales its queries by the root of.

    Args:
        layers: How many there are.
        across: The hidden size over the heads.
        size: Of a head.
    """
    return across if layers == _GEMMA_27B else size


def rope_of(config: Any) -> dict[str, Any]:
    """Returns the rotary embedding's parameters, of the layers that look at everything."""
    found: dict[str, Any] = config.rope_parameters or {}
    full: dict[str, Any] = found.get(_FULL, found)
    return full


def head_size(config: Any) -> int:
    """Returns the rows of a head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def experts_of(config: Any) -> int:
    """Returns how many experts a layer has; 0 of a dense model."""
    names = "num_local_experts", "num_experts"
    return next((int(getattr(config, name)) for name in names if hasattr(config, name)), 0)


def row_order(config: Any, name: str) -> Tensor | None:
    """Returns where llama.cpp's rows of a query or key matrix are found, if it rotates pairs."""
    leaf = name.rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf)
    if heads is None:
        return None
    size = head_size(config)
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def shift_of(known: Architecture, name: str) -> float:
    """Returns what llama.cpp's weight has added to a tensor of the model."""
    return known.norm_shift if name.endswith("norm.weight") else 0.0


def add_metadata(
    writer: gguf.GGUFWriter, model: PreTrainedModel, known: Architecture, qtype: str
) -> None:
    """Writes what llama.cpp has to know of a model beside its tensors."""
    import gguf

    config = model.config
    size, rope = head_size(config), rope_of(config)
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None) or 0
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or "model")).name)
    if known.name == "gemma3":
        local: dict[str, Any] = config.rope_parameters.get(_SLIDING, rope)
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(float(local.get("rope_theta", 10000.0)))
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif window and getattr(config, "use_sliding_window", True):
        context = min(context, window)
    if known.name in ("granite", "granitemoe"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if known.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(context)
        # Read by llama.cpp as none.
        writer.add_sliding_window(0)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    experts = experts_of(config)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, add in (
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if hasattr(config, name):
            add(getattr(config, name))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    # The others rotate whole heads, whatever their configuration says.
    share = rope.get("partial_rotary_factor", 1.0) if known.name == "phi3" else 1.0
    writer.add_rope_dimension_count(int(size * share))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type(qtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
