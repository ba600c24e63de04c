"""What the quality benchmark scores a model on: the demo's model, and articles made up here."""

from __future__ import annotations

import json
import math
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

from quality_tasks import Example, make_tasks, pack_blocks, score

WORDS = ("river", "engine", "letter", "island")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "wikipedia").mkdir()
    articles = [
        {
            "title": f"The {word} {number}",
            "topic": "Things" if number < 4 else "Alone",
            "text": f"The {word} {number} is a {word} of some kind. Nobody knows each {word}. So.",
        }
        for number, word in enumerate((*WORDS, "other"))
    ]
    lines = "\n".join(map(json.dumps, articles))
    (folder / "wikipedia/test.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    folder = str(files("bitlab_hf.demo") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_tasks(models: Path, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    tasks = make_tasks(tokenizer, models / "wikipedia", "test", 2, 100, length=32)
    assert tasks.blocks.shape == (2, 32)
    assert [tokenizer.decode(one.choices[0]) for one in tasks.words] == [
        f" {word}" for word in (*WORDS, "other")
    ]
    assert tokenizer.decode(tasks.words[0].context).endswith("Nobody knows each")
    # The one article of its topic has no other titles to choose from.
    assert len(tasks.titles) == len(WORDS)
    for one in tasks.titles:
        assert "The river 0" not in tokenizer.decode(one.context)
        assert len({tuple(choice) for choice in one.choices}) == 4
        assert one.sizes == [len(tokenizer.decode(choice).encode()) for choice in one.choices]
    found = score(model, tasks)
    with torch.no_grad():
        loss = model(input_ids=tasks.blocks, labels=tasks.blocks).loss.item()
    assert found["nats"] == pytest.approx(loss, rel=1e-5)
    tokens = tasks.blocks[:, 1:].numel()
    assert found["bits_per_byte"] == pytest.approx(loss * tokens / tasks.bytes / math.log(2))
    again = score(model, tasks, found["predicted"])
    assert again["agreement"] == 1.0
    other = score(model, tasks, found["predicted"].flip(0))
    assert other["agreement"] < 1.0


def test_choices_are_scored_as_one_pass_scores_them(demo: tuple[Any, Any]) -> None:
    from quality_tasks import _log_probabilities

    model, tokenizer = demo
    context = tokenizer("def main(arguments):", add_special_tokens=False)["input_ids"]
    texts = (" return None", "\n    import os", " 0")
    choices = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    example = Example(context, choices, [len(text) for text in texts])
    with torch.no_grad():
        scored = _log_probabilities(model, example)
        for choice, (likelihood, said) in zip(choices, scored, strict=True):
            logits = model(input_ids=torch.tensor([context + choice])).logits[0].double()
            rows = logits[len(context) - 1 : -1].log_softmax(-1)
            wanted = torch.tensor(choice)
            assert likelihood == pytest.approx(
                float(rows.gather(1, wanted[:, None]).sum()), abs=1e-3
            )
            assert said == bool((rows.argmax(-1) == wanted).all())


def test_too_little_text(demo: tuple[Any, Any]) -> None:
    _, tokenizer = demo
    with pytest.raises(SystemExit, match="must hold 100 blocks, got 0"):
        pack_blocks(tokenizer, ["short"], 100, 32, 0)
    assert pack_blocks(tokenizer, ["a b c d e f g h"] * 40, None, 32, 0).shape[1] == 32
