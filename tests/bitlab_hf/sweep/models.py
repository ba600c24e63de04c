"""Which class an architecture is built as, and what its forward is given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.bitlab_hf.sweep.configs import FIRST_TOKEN, VOCABULARY
from tests.bitlab_hf.sweep.special import CLASSES, INPUTS, NOT_SWEPT

# The first that has the architecture decides: what is trained and generated from comes first.
_TASKS = [
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "MULTIMODAL_LM",
    "CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "TIME_SERIES_PREDICTION",
    "PRETRAINING",
]
BATCH, TOKENS = 2, 12
TEXT = ("input_ids", "decoder_input_ids", "attention_mask", "bbox")


def architectures() -> list[str]:
    """Returns the names of the architectures of transformers that are swept."""
    names = [name for name in CONFIG_MAPPING_NAMES if class_name(name) is not None]
    return sorted(set(names) - set(NOT_SWEPT))


def class_name(model_type: str) -> str | None:
    """Returns the name of the class that an architecture is built as."""
    if model_type in CLASSES:
        return CLASSES[model_type]
    for task in [f"MODEL_FOR_{task}" for task in _TASKS] + ["MODEL"]:
        found = getattr(modeling_auto, f"{task}_MAPPING_NAMES").get(model_type)
        if found is not None:
            return found if isinstance(found, str) else found[0]
    return None


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class that an architecture is built as."""
    name = class_name(model_type)
    assert name is not None
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Returns the class of an architecture's configuration."""
    found: type[PreTrainedConfig] = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    return found


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what a model's forward is given: what it requires, and its main input."""
    config = model.config
    signature = inspect.signature(type(model).forward).parameters
    names = [
        name
        for name, parameter in signature.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name != "self"
    ]
    main = model.main_input_name
    if main in signature and main not in names:
        names.append(main)
    if "decoder_input_ids" in signature and getattr(config, "is_encoder_decoder", True):
        names.append("decoder_input_ids")
    for also in ("pixel_values", "input_ids"):
        if main in ("input_ids", "pixel_values") and also in signature and also not in names:
            names.append(also)
    if "image_grid_thw" in signature and "pixel_values" in names:
        names.append("image_grid_thw")
    if "bbox" in signature:
        names.append("bbox")
    generator = torch.Generator().manual_seed(7)
    special = INPUTS.get(config.model_type, {})
    made: dict[str, Any] = {}
    for name in dict.fromkeys([*names, *special]):
        shape = special.get(name, ...)
        if shape is None:
            continue
        if shape is ...:
            made[name] = _default(name, config, generator)
        else:
            made[name] = _of(name, shape, find(config, "vocab_size", VOCABULARY), generator)
    return made


def _of(name: str, shape: Any, vocabulary: int, generator: torch.Generator) -> Any:
    if not isinstance(shape, tuple):
        return torch.tensor(shape) if isinstance(shape, list) else shape
    if shape[0] == "ids":
        name, shape = "ids", shape[1:]
    if name.endswith(("ids", "codes")):
        first = FIRST_TOKEN if vocabulary > FIRST_TOKEN + 10 else 3
        return torch.randint(first, max(vocabulary, 5), shape, generator=generator)
    if "mask" in name:
        return torch.ones(shape, dtype=torch.long)
    return torch.randn(shape, generator=generator)


def _default(name: str, config: PreTrainedConfig, generator: torch.Generator) -> Any:
    if name == "grid_thw" or name == "image_grid_thw":
        return torch.tensor([[1, 4, 4]] * BATCH)
    made = _shape(name, config)
    if made is None:
        raise NotImplementedError(f"no input is known for {name}")
    if name == "bbox":
        return torch.randint(0, 30, made, generator=generator).sort(-1).values
    return _of(name, made, find(config, "vocab_size", VOCABULARY), generator)


def _shape(name: str, config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Returns the shape of an input, None for one that is not known."""
    channels, size = find(config, "num_channels", 3), _side(config)
    patch = find(config, "patch_size", 8)
    if name in ("pixel_values", "hidden_states") and _merges(config):
        depth = find(config, "temporal_patch_size", 2) * find(config, "in_channels", 3)
        return BATCH * 16, depth * patch * patch
    hidden = find(config, "hidden_size", 64)
    sounds = 2 * find(config, "max_source_positions", 64)
    frames = vars(config).get("num_frames")
    return {
        "input_ids": (BATCH, TOKENS),
        "decoder_input_ids": (BATCH, TOKENS),
        "qformer_input_ids": (BATCH, TOKENS),
        "entity_ids": (BATCH, 3),
        "bbox": (BATCH, TOKENS, 4),
        "pixel_values_videos": (BATCH, find(config, "num_frames", 4), channels, *size),
        "pixel_values": (BATCH, frames, channels, *size) if frames else (BATCH, channels, *size),
        "input_values": (BATCH, 3200),
        "input_features": (BATCH, find(config, "num_mel_bins", 32), sounds),
        "input_features_mask": (BATCH, sounds),
        "hidden_states": (BATCH, TOKENS, hidden),
        "inputs_embeds": (BATCH, TOKENS, hidden),
        "query_embeds": (BATCH, TOKENS, hidden),
        "encoder_hidden_states": (BATCH, TOKENS, hidden),
        "attention_mask": (BATCH, TOKENS),
    }.get(name)


def _merges(config: PreTrainedConfig) -> bool:
    """Tells whether images come as one sequence of patches."""
    return find(config, "temporal_patch_size", None) is not None


def _side(config: PreTrainedConfig) -> tuple[int, int]:
    size = find(config, "image_size", 32)
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def find(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """Returns a field of a configuration or of the first nested one that has it."""
    if vars(config).get(name) is not None or name in config.attribute_map:
        return getattr(config, name)
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found = find(value, name, None)
            if found is not None:
                return found
    return default


def fit_image_tokens(
    model: PreTrainedModel, inputs: dict[str, Any], error: str
) -> dict[str, Any] | None:
    """Returns the inputs with as many placeholder tokens as a model's complaint asks for."""
    if "mm_token_type_ids" in error and "mm_token_type_ids" not in inputs:
        return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}
    found = re.search(r"tokens:?\D*(\d+)\D+?(?:features|embeddings)\D*?(\d+)", error)
    token = next(
        (
            getattr(model.config, name)
            for name in (
                "image_token_id",
                "image_token_index",
                "audio_token_id",
                "media_token_id",
                "audio_token_index",
                "video_token_id",
                "im_patch_id",
            )
            if isinstance(getattr(model.config, name, None), int)
        ),
        None,
    )
    if found is None or token is None or "input_ids" not in inputs:
        return None
    rows = inputs["input_ids"]
    count = int(found[2])
    # Some count features of the whole batch, some name a tensor's first dimension.
    each = count // BATCH if count % BATCH == 0 else count
    ids = torch.cat([rows[:, :2], torch.full((BATCH, each), token), rows[:, 2:6]], dim=1)
    fitted = {**inputs, "input_ids": ids}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        fitted["mm_token_type_ids"] = (ids == token).long()
    return fitted


def flat(output: Any) -> list[Tensor]:
    """Returns the float tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in flat(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in flat(value)]
    return []
