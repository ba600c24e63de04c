"""What the tests of the int8 head share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig
from bitlayers import Int8Embedding, Int8Linear

EMBEDDING = "model.embed_tokens"
# Which module's names a file holds.
OWNERS = {"qwen2": EMBEDDING, "gemma": EMBEDDING, "llama": "lm_head"}


def load(path: Path, config: Any = None, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return auto.from_pretrained(path, **options)


def int8(**fields: Any) -> BitLabConfig:
    return BitLabConfig(head="int8", **fields)


def assert_int8(model: Any, is_tied: bool) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is Int8Linear
    assert head._parameters["weight"] is None
    if not is_tied:
        assert isinstance(embedding.weight, nn.Parameter)
        return
    assert type(embedding) is Int8Embedding
    assert embedding._parameters["weight"] is None
    assert head.qweight is embedding.qweight
    assert head.qweight_scale.data_ptr() == embedding.qweight_scale.data_ptr()
