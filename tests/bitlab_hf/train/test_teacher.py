"""Who can be distilled: causal language models, and what is said to all others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config, TrainingArguments

from bitcore.errors import ArgumentError
from bitlab_hf import replace_linear
from bitlab_hf.train import BitLabTrainer, precompute_logits
from tests.bitlab_hf.models import CONFIGS, training_data

_T5 = T5Config(
    vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
)
OTHERS = [
    (CONFIGS["llama"], "LlamaForSequenceClassification"),
    (CONFIGS["llama"], "LlamaForTokenClassification"),
    (CONFIGS["llama"], "LlamaForQuestionAnswering"),
    (CONFIGS["llama"], "LlamaModel"),
    (CONFIGS["bert"], "BertForMaskedLM"),
    (CONFIGS["bert"], "BertForPreTraining"),
    (CONFIGS["bert"], "BertForMultipleChoice"),
    (_T5, "T5ForConditionalGeneration"),
    (_T5, "T5EncoderModel"),
]


def trainer(model: Any, folder: Path, **fields: Any) -> BitLabTrainer:
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, max_steps=1)
    data = training_data(8)
    return BitLabTrainer(model=model, args=args, train_dataset=data, statistics=False, **fields)


@pytest.mark.parametrize(("config", "kind"), OTHERS, ids=[kind for _, kind in OTHERS])
def test_only_causal_language_models_are_distilled(config: Any, kind: str, tmp_path: Path) -> None:
    def make(config: Any) -> Any:
        # An encoder writes into the configuration that it is made from.
        return getattr(transformers, kind)(copy.deepcopy(config))

    said = rf"model must be a causal language model to be distilled, got {kind}\n.*recipe='plain'"
    for recipe in ("default", "distill"):
        with pytest.raises(ArgumentError, match=said):
            trainer(make(config), tmp_path, teacher=make(config), recipe=recipe)
    with pytest.raises(ArgumentError, match=f"teacher must be a causal language model.*{kind}"):
        precompute_logits(make(config), [], tmp_path / "logits")
    assert not (tmp_path / "logits").exists()
    # Nothing is said where nothing is distilled.
    trainer(make(config), tmp_path, recipe="plain")
    causal = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(ArgumentError, match=f"teacher must be a causal language model.*{kind}"):
        trainer(causal, tmp_path, teacher=make(config), recipe="distill")


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig, "LlamaForCausalLM"), (BertConfig, "BertLMHeadModel")],
)
def test_causal_ones_are(config: Any, kind: str, tmp_path: Path) -> None:
    sizes = CONFIGS["llama"].to_dict() | {"model_type": config.model_type, "is_decoder": True}
    settings = config(**{k: v for k, v in sizes.items() if k not in ("architectures", "head_dim")})
    torch.manual_seed(0)
    model = replace_linear(getattr(transformers, kind)(settings))
    run = trainer(model, tmp_path, teacher=getattr(transformers, kind)(settings), recipe="distill")
    run.train()
    assert run.state.log_history[-1]["train_loss"] > 0
