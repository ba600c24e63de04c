"""What a process that never imports BitLab does with a deployed model.

Run as ``python -m tests.bitlab_autoload.uses USE MODEL ASSISTANT SCRATCH``; prints what it found as
JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

PROMPT = "def main():"


def _kinds(model: Any) -> dict[str, int]:
    return {
        "packed": sum(type(m).__name__ == "BitLinear" and m.is_deployed for m in model.modules()),
        "float": sum(type(m) is torch.nn.Linear for m in model.modules()),
    }


def _encoded(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt")


def causal(model: str, assistant: str, scratch: Path) -> Any:
    """AutoModelForCausalLM, with and without assisted decoding."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    options = {"max_new_tokens": 16, "do_sample": False}
    encoded = _encoded(model)
    plain = loaded.generate(**encoded, **options)
    draft = AutoModelForCausalLM.from_pretrained(assistant)
    assisted = loaded.generate(**encoded, **options, assistant_model=draft)
    return {
        **_kinds(loaded),
        "logits": loaded(**encoded).logits.double().sum().item(),
        "tokens": plain.tolist(),
        "assisted": assisted.tolist(),
    }


def pipe(model: str, assistant: str, scratch: Path) -> Any:
    """pipeline("text-generation")."""
    generator = pipeline("text-generation", model=model)
    text = generator(PROMPT, max_new_tokens=16, do_sample=False)[0]["generated_text"]
    return {**_kinds(generator.model), "text": text}


def heads(model: str, assistant: str, scratch: Path) -> Any:
    """AutoModel, and a new classification head."""
    base = AutoModel.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    encoded = _encoded(model)
    loss = classifier(**encoded, labels=torch.tensor([1])).loss
    loss.backward()
    return {
        "base": _kinds(base),
        "classifier": _kinds(classifier),
        "head": str(type(classifier.score)),
        "gradient": classifier.score.weight.grad.abs().sum().item(),
        "hidden": list(base(**encoded).last_hidden_state.shape),
    }


def peft(model: str, assistant: str, scratch: Path) -> Any:
    """An adapter: made, trained one step, saved, and loaded by AutoPeftModel."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    loaded = AutoModelForCausalLM.from_pretrained(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(loaded, lora)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
    encoded = _encoded(model)
    adapted(**encoded, labels=encoded["input_ids"]).loss.backward()
    optimizer.step()
    adapted.eval()
    expected = adapted(**encoded).logits
    adapted.save_pretrained(scratch / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(scratch / "adapter")
    with again.disable_adapter():
        without = again(**encoded).logits
    return {
        **_kinds(again),
        "equal": torch.equal(again(**encoded).logits, expected),
        "adapter_counts": not torch.equal(without, expected),
    }


def _main() -> None:
    use, model, assistant, scratch = sys.argv[1:]
    assert "bitlab_hf" not in sys.modules
    found = globals()[use](model, assistant, Path(scratch))
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
