"""Other programs on a deployed model: `transformers serve` and `chat`, and lm_eval.

None of them knows BitLab: they run their own commands on its folder.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, save

pytestmark = pytest.mark.ci
BIN = Path(sys.executable).parent
DEMO = str(Path(__file__).parents[2] / "bitlab_hf/demo/model")
PROMPT = "class Foo(object):"
TOKENS = 12
# Question, answers to choose from, the right one.
ROWS = [
    ("import", [" os", " zebra"], 0),
    ("def f(self", [" banana", "):"], 1),
    ("for i in", [" %%", " range"], 1),
    ("return", [" True", "class"], 1),
]
TASK = """\
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem") / "deployed"
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=BitLabConfig(mode="infer")
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    save(model, folder, tokenizer=tokenizer)
    return folder


@contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """Runs `transformers serve` on loopback; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [BIN / "transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port),
             "--device", "cpu"],
            stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not answers(f"{address}/health"):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def greedy(deployed: Path) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(deployed)
    tokenizer = AutoTokenizer.from_pretrained(deployed)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.strip()
    return str(text)


def test_serve_and_chat(deployed: Path, tmp_path: Path) -> None:
    expected = greedy(deployed)
    with served(deployed, tmp_path / "log.txt") as address:
        body = {
            "model": str(deployed),
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["content"] == expected
        # It asks whether to go on ("n") only where the server says that the limit ended the answer.
        chat = subprocess.run(
            [BIN / "transformers", "chat", deployed, address, f"max_new_tokens={TOKENS}",
             "do_sample=False"],
            input=f"{PROMPT}\nn\n" + "!exit\n" * 4, capture_output=True, text=True, check=False,
            cwd=tmp_path, timeout=120, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        assert chat.returncode == 0, (
            chat.stderr[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
        )
        assert expected.strip() in chat.stdout


def log_likelihood(model: Any, tokenizer: Any, text: str, answer: str) -> float:
    """Of an answer after a text, in nats, as one forward pass gives it."""
    ids = tokenizer(text + answer, return_tensors="pt")["input_ids"]
    first = len(tokenizer(text)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(first, ids.shape[1])
    return sum(float(logits[place - 1, ids[0, place]]) for place in places)


def test_lm_eval(deployed: Path, tmp_path: Path) -> None:
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    done = subprocess.run(
        [BIN / "lm_eval", "--model", "hf", "--model_args", f"pretrained={deployed},dtype=float32",
         "--tasks", "local", "--include_path", tmp_path, "--device", "cpu", "--log_samples",
         "--output_path", tmp_path / "out"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
             "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = {
        sample["doc"]["question"]: [float(one[0]) for one in sample["filtered_resps"]]
        for sample in map(json.loads, samples.read_text().splitlines())
    }
    model = AutoModelForCausalLM.from_pretrained(deployed, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(deployed)
    right = 0
    for question, choices, answer in ROWS:
        expected = [log_likelihood(model, tokenizer, question, choice) for choice in choices]
        assert found[question] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == answer
    accuracy = json.loads(results.read_text())["results"]["local"]["acc,none"]
    assert accuracy == pytest.approx(right / len(ROWS))
