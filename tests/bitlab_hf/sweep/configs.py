"""`small`: any configuration class of transformers, at a size that a test can afford.

A field is recognised by its name and kept within a limit; a nested configuration is shrunk the same
way. What that does not get right is data, in `special.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from tests.bitlab_hf.sweep.special import FIELDS

VOCABULARY = 97
# Token ids below are special ones; the inputs' ordinary tokens come from above.
FIRST_TOKEN = 60
# By name, first match; a value is lowered to the limit, never raised.
_LIMITS = [
    (r"^type_vocab_size$", 2),
    (r"codebook_size$|num_codevectors", 64),
    (r"vocab_size|num_embeddings$", VOCABULARY),
    (r"position_embeddings$|_positions$|n_positions|n_ctx|max_seq_len|model_max_length", 128),
    (
        r"dropout|drop_rate|drop_path|layerdrop|pdrop|drop_prob|drop_connect|jitter|label_noise|mask_\w+_prob",
        0.0,
    ),
    (r"(moe|expert|shared)\w*_(intermediate_size|hidden_size|ffn_dim)|moe_latent", 64),
    (r"intermediate_(size|dim)|ffn_dim|ffn_hidden|mlp_dim|d_ff$|d_inner|inner_dim|n_inner", 128),
    (r"feed_?forward_(dim|proj)|mlp_hidden|ffn_size", 128),
    (r"num_kv_shared_layers", 0),
    (r"(key_value|kv)_heads|num_kv|kv_groups|query_groups", 2),
    (r"experts_per_tok|experts_per_token|moe_topk|moe_k$|num_selected_experts|top_k_experts", 2),
    (r"(num|n)_?(routed|local|moe)?_?(num_)?experts$|moe_num_experts|num_local_experts", 4),
    (r"n_groups?$|topk_group|num_expert_group", 1),
    (r"upsample_groups", 64),
    (r"rotary_dim$", 8),
    (r"num_shared_experts|n_shared_experts", 1),
    (r"_heads$|n_head$|_n_heads$|attention_heads|num_heads", 4),
    (r"rope_head_dim", 8),
    (r"head_dim$|head_size$|d_kv$|dim_head$|d_head$|dim_key|dim_value|per_head", 16),
    (r"lora_rank|_rank$", 16),
    (r"conv_pos_embeddings$", 16),
    (r"conv_pos_embedding_groups", 4),
    (
        r"(num|n)_(\w+_)?layers?$|_layers$|n_layer$|num_blocks$|depth$|num_\w*_depth|num_layers_\w+",
        2,
    ),
    (r"stride$|_kernel\w*$|downsample|d_conv", None),
    (r"image_size|input_image_size|pretrain_image_size|crop_size", 32),
    (r"patch_size$", 8),
    (r"sliding_window$|attention_window|window_size|local_window|_context$|chunk_size$", 8),
    (r"num_mel_bins|n_mels|num_mels|mel_bins", 32),
    (r"num_queries|num_query_tokens|num_denoising|num_latents$", 8),
    (r"max_source_positions", 64),
    (r"state_size|d_state|ssm_state", 16),
    (r"index_topk", 4),
    (r"pooler_fc_size|image_seq_length|mm_tokens", 16),
    (
        r"(hidden|embed|embedding|embedd?ing|emb|projection|proj|model|feature|out|output|input|"
        r"text|vision|audio|cross|latent|query|key|value|decoder|encoder|global|codebook|fusion|"
        r"fpn|backbone|neck|head|pooler|projector|word|cond|time|ssm)\w*_?(size|dims?|channels)$",
        64,
    ),
    (r"^(d_model|n_embd|dim|width|embed_dim|model_dim|hidden_sz|channels_last|num_filters)$", 64),
]
_LIMITS_COMPILED = [(re.compile(pattern), limit) for pattern, limit in _LIMITS]
_LISTS = re.compile(r"(size|dim|channel|width|filter|embed)\w*s?$")
_DEPTHS = re.compile(r"depths|num_blocks|num_layers|num_block_repeats")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_TOKENS = ["pad", "bos", "eos", "decoder_start", "sep", "cls", "mask", "unk"]


def small(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Returns a small configuration of a class, ready to build a model from."""
    special = FIELDS.get(config_class.model_type, {})
    plain = {name: value for name, value in special.items() if "." not in name}
    try:
        # Some fields change what other fields are made of.
        model = config_class(**plain)
    except StrictDataclassError:
        # Small sizes that do not go with the default ones.
        model = config_class()
    return _shrunk(config_class, model, special)


def _shrunk(
    config_class: type[PreTrainedConfig], model: PreTrainedConfig, special: dict[str, Any]
) -> PreTrainedConfig:
    """Returns a configuration of a class, small, with the structure of a model one."""
    own = FIELDS.get(config_class.model_type, {})
    special = {**own, **special}
    values: dict[str, Any] = {}
    tokens = _Tokens()
    layers = _layers(model)
    for field in dataclasses.fields(config_class):
        # Not by attribute: what may differ between layers refuses to be read so.
        name, value = field.name, vars(model).get(field.name)
        if isinstance(value, PreTrainedConfig):
            inner = {
                key.removeprefix(f"{name}."): given
                for key, given in special.items()
                if key.startswith(f"{name}.")
            }
            values[name] = _shrunk(type(value), value, inner)
        elif name.endswith(("token_id", "token_index", "_id")) and type(value) in (int, list):
            values[name] = tokens.id(name, value)
        elif _per_layer(name, value, model):
            values[name] = _one_of_each(value, layers)
        elif field.default is None and "mrope_section" not in str(value):
            continue
        elif name in _LAYERS:
            values[name] = min(value, layers)
        else:
            lowered = _lowered(name, value, model)
            if lowered is not None:
                values[name] = lowered
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        # Latent attention has a key and a value for each head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    plain = {name: value for name, value in special.items() if "." not in name}
    return config_class(**{**values, **plain})


def _lowered(name: str, value: Any, model: PreTrainedConfig) -> Any:
    """Returns the small value of a field, or None where its default is to stay."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, dict):
        return (
            _rope(value, getattr(model, "partial_rotary_factor", None)) if "rope" in name else None
        )
    limit = next((limit for pattern, limit in _LIMITS_COMPILED if pattern.search(name)), None)
    if isinstance(value, (list, tuple)):
        return _shorter(name, list(value), limit, model)
    if isinstance(value, (int, float)) and limit is not None:
        return type(value)(min(value, limit))
    return None


def _shorter(name: str, value: list[Any], limit: float | None, model: PreTrainedConfig) -> Any:
    if not value or not all(type(item) is int for item in value):
        return None
    if _DEPTHS.search(name):
        return [min(item, 1) for item in value]
    if name.endswith("heads"):
        return [item // math.gcd(*value) for item in value]
    if limit == 32 or "image" in name:
        return [min(item, 32) for item in value]
    if limit == 64 and _LISTS.search(name):
        largest = max(value)
        factor = 1
        while largest // factor > 64 and all(item % (factor * 2) == 0 for item in value):
            factor *= 2
        return [item // factor for item in value]
    return None


def _rope(parameters: dict[str, Any], partial: float | None) -> dict[str, Any]:
    """Sections of multimodal rotary embeddings, for heads of 16."""
    changed = dict(parameters)
    for key, value in parameters.items():
        if isinstance(value, dict):
            changed[key] = _rope(value, partial)
        elif key == "mrope_section":
            pairs = int(8 * (parameters.get("partial_rotary_factor") or partial or 1))
            rest = [pairs // len(value)] * (len(value) - 1)
            changed[key] = [*rest, pairs - sum(rest)]
    return changed


def _layers(model: PreTrainedConfig) -> int:
    """Returns how many layers show each kind that there is."""
    lists = [value for name, value in vars(model).items() if _per_layer(name, value, model)]
    words = [value for value in lists if isinstance(value[0], str)]
    return max([2, *(len(dict.fromkeys(value)) for value in words)])


def _per_layer(name: str, value: Any, model: PreTrainedConfig) -> bool:
    """Tells whether a field is a list with a word for each layer."""
    counts = [vars(model).get(field) for field in _LAYERS]
    return (
        isinstance(value, (list, tuple))
        and ("layer" in name or "types" in name)
        and len(value) > 0
        and len(value) in counts
        and all(isinstance(item, (str, int, bool)) for item in value)
    )


def _one_of_each(value: Any, layers: int) -> list[Any]:
    kinds = list(dict.fromkeys(value))
    return (kinds * layers)[:layers]


class _Tokens:
    """Distinct special tokens, below `FIRST_TOKEN`; the same name gets the same one everywhere."""

    def id(self, name: str, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list):
            return [2]
        if value < 0:
            return value
        for index, prefix in enumerate(_TOKENS):
            if name == f"{prefix}_token_id":
                return index
        # Names are few: a sum of characters keeps the usual ones apart, the same in every process.
        return 10 + sum(map(ord, re.sub("_(id|index)$", "", name))) % 49
