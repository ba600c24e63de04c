"""Every kind of model that transformers' auto classes make: ternary, saved, and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BartConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from bitcore.errors import ConfigError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.models import CONFIGS, token_ids

IDS = {"input_ids": token_ids()}
LLAMA, BERT = CONFIGS["llama"], CONFIGS["bert"]
T5 = T5Config(
    vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
)
BART = BartConfig(
    vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
)  # fmt: skip
VIT = ViTConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=16,
)  # fmt: skip
SPEECH = Wav2Vec2Config(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), vocab_size=32,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=32,
)  # fmt: skip
WHISPER = WhisperConfig(
    vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16,
    max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
DECODER = {"decoder_input_ids": token_ids()[:, :4]}
MODELS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "AutoModel": (LLAMA, IDS),
    "AutoModelForSequenceClassification": (BERT, IDS),
    "AutoModelForTokenClassification": (BERT, IDS),
    "AutoModelForQuestionAnswering": (BERT, IDS),
    "AutoModelForMultipleChoice": (BERT, {"input_ids": token_ids()[None]}),
    "AutoModelForNextSentencePrediction": (BERT, IDS),
    "AutoModelForPreTraining": (BERT, IDS),
    "AutoModelForSeq2SeqLM": (T5, IDS | DECODER),
    "AutoModelForImageClassification": (VIT, {"pixel_values": torch.rand(2, 3, 32, 32)}),
    "AutoModelForMaskedImageModeling": (VIT, {"pixel_values": torch.rand(2, 3, 32, 32)}),
    "AutoModelForCTC": (SPEECH, {"input_values": torch.rand(2, 800)}),
    "AutoModelForAudioClassification": (SPEECH, {"input_values": torch.rand(2, 800)}),
    "AutoModelForSpeechSeq2Seq": (
        WHISPER,
        {"input_features": torch.rand(2, 16, 64)} | {k: v[:2] for k, v in DECODER.items()},
    ),
}
# A batch needs a padding token.
LLAMA_LABELS = copy.deepcopy(LLAMA)
LLAMA_LABELS.update({"pad_token_id": 0})
CASES = [(name, config, inputs) for name, (config, inputs) in MODELS.items()] + [
    (name, LLAMA_LABELS, IDS)
    for name in MODELS
    if name.endswith(("SequenceClassification", "TokenClassification", "QuestionAnswering"))
]


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = model(**inputs)
    return [value for value in found.to_tuple() if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    ("name", "config", "inputs"), CASES, ids=[f"{name}-{c.model_type}" for name, c, _ in CASES]
)
def test_every_head(name: str, config: Any, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """The head stays as it was; what is saved or packed at load gives the same outputs."""
    auto = getattr(transformers, name)
    auto.from_config(config).save_pretrained(tmp_path / "float")
    latent = auto.from_pretrained(tmp_path / "float", quantization_config=BitLabConfig()).eval()
    layers = [found.names[0] for found in quantized_layers(latent)]
    assert len(layers) >= 8
    assert not any("classifier" in layer or "lm_head" in layer for layer in layers)
    expected = outputs(latent, inputs)
    model = deploy(latent)
    model.save_pretrained(tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed")
    assert all(found.module.is_deployed for found in quantized_layers(again))
    assert [found.names[0] for found in quantized_layers(again)] == layers
    at_load = auto.from_pretrained(
        tmp_path / "float", quantization_config=BitLabConfig(mode="infer")
    )
    for one in (model, again, at_load):
        for value, other in zip(outputs(one, inputs), expected, strict=True):
            # A float head's products depend on where in memory its weight lies.
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


def test_an_int8_head_that_its_model_initializes(tmp_path: Path) -> None:
    auto = transformers.AutoModelForSeq2SeqLM
    config, inputs = MODELS["AutoModelForSeq2SeqLM"]
    auto.from_config(config).save_pretrained(tmp_path / "float")
    model = auto.from_pretrained(
        tmp_path / "float", quantization_config=BitLabConfig(mode="infer", head="int8")
    )
    model.save_pretrained(tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed")
    for value, other in zip(outputs(again, inputs), outputs(model, inputs), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_a_ternary_head_among_others_that_are_tied(config: Any, tmp_path: Path) -> None:
    """One field ties the encoder's and the decoder's embeddings too, which would be lost."""
    made: Any = transformers.AutoModelForSeq2SeqLM.from_config(copy.deepcopy(config))
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="embed_tokens.weight tied too\nPass head='keep'"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path, quantization_config=BitLabConfig(head="ternary")
        )
