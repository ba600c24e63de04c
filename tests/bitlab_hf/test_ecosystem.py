"""Other programs on a deployed model: `transformers serve` and `chat`, and lm_eval.

None of them knows BitLab: they run their own commands on its folder.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, save
from tests.bitlab_hf.greedy import greedy_tokens

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


def deploy(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    config = BitLabConfig(mode="infer", **fields)
    model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy(tmp_path_factory.mktemp("ecosystem") / "deployed")


@contextmanager
def served(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Runs `transformers serve` on loopback; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [BIN / "transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port),
             "--device", "cpu", *options],
            stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            end = time.monotonic() + 600
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


def greedy(deployed: Path, *prompts: str, margin: float = 0.0) -> list[str]:
    model: Any = AutoModelForCausalLM.from_pretrained(deployed)
    tokenizer = AutoTokenizer.from_pretrained(deployed)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = greedy_tokens(model, ids, margin, max_new_tokens=TOKENS)
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        # The tokens may end within a character.
        texts.append(text.rstrip("\N{REPLACEMENT CHARACTER}") if len(tokens) < TOKENS else text)
    return texts


def complete(address: str, model: Path, prompt: str) -> str:
    """What is streamed as the continuation of a prompt, of the first piece at least."""
    body = {
        "model": str(model), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        pieces = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
    return "".join(one["choices"][0]["text"] for one in pieces if one["choices"])


def leave(address: str, model: Path) -> None:
    """Begins to read a long answer and goes away."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    body = {"model": str(model), "prompt": PROMPT, "max_tokens": 400, "stream": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()


def test_serve_many_at_once(tmp_path: Path) -> None:
    """Continuous batching, with prompts of very different lengths and clients that leave.

    Its paged attention adds up in another order, which hangs on who asks at the same time. That
    must not decide a token: activations and results stay float32.
    """
    deployed = deploy(tmp_path / "deployed", torch.float32, activation_dtype="float32")
    prompts = [PROMPT, "import os\n" * 40, "x", "def f(self, a, b):\n" * 12, "for i in range("]
    expected = greedy(deployed, *prompts, margin=1e-3)
    assert sum(map(bool, expected)) > len(prompts) / 2
    assert any(text.strip() for text in expected)
    # Without a number of blocks the cache takes most of the memory.
    options = ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "64",
               "--cb-max-batch-tokens", "64")  # fmt: skip
    with served(deployed, tmp_path / "log.txt", *options) as address:
        with ThreadPoolExecutor(len(prompts) + 2) as pool:
            left = [pool.submit(leave, address, deployed) for _ in range(2)]
            found = list(pool.map(lambda prompt: complete(address, deployed, prompt), prompts))
        for one in left:
            one.result()
        agree = [one.startswith(sure) for one, sure in zip(found, expected, strict=True)]
        assert all(agree), (tmp_path / "log.txt").read_text()[-3000:]
        assert complete(address, deployed, PROMPT).startswith(expected[0])
        bad = urllib.request.Request(
            f"{address}/v1/completions", b'{"model": "', {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(bad, timeout=60)
        assert complete(address, deployed, prompts[1]).startswith(expected[1])


def test_serve_and_chat(deployed: Path, tmp_path: Path) -> None:
    # The chat template adds the end of the line.
    (expected,) = greedy(deployed, f"{PROMPT}\n")
    assert expected.strip()
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
