"""``bitlab serve`` with vLLM: a real client, and what clients do that they should not."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, save
from tests.bitlab_vllm.conftest import ROOT, variables

pytestmark = pytest.mark.ci
BITLAB = Path(sys.executable).with_name("bitlab")
PROMPT = "class Foo(object):\n    def __init__(self"
TOKENS = 24


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "deployed"
    source = ROOT / "bitlab_hf/demo/model"
    config = BitLabConfig(mode="infer", head="int8", weight_granularity="per_channel")
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save(model, folder, tokenizer=tokenizer)
    return folder


def greedy(deployed: Path, prompt: str) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(deployed)
    tokenizer = AutoTokenizer.from_pretrained(deployed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(deployed: Path, environment: Path, port: int) -> list[str | Path]:
    return [
        BITLAB, "serve", deployed, "--vllm", environment, "--port", str(port),
        "--", "--max-model-len", "512", "--enforce-eager",
    ]  # fmt: skip


class Server:
    """A running server and its address."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def open(self, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"}
        )
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=120)
        return response

    def status(self, path: str, body: bytes | None = None) -> tuple[int, str]:
        try:
            with self.open(path, body) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait(self) -> None:
        end = time.monotonic() + 900
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            try:
                if self.status("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)

    def complete(self, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        code, text = self.status("/v1/completions", json.dumps(body).encode())
        assert code == 200, text
        return str(json.loads(text)["choices"][0]["text"])

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@contextmanager
def served(command: list[str | Path], port: int, log: Path) -> Iterator[Server]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **variables()},
        )  # fmt: skip
    server = Server(process, port, log)
    try:
        server.wait()
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def read_a_little(server: Server, model: str, answers: int = 1) -> http.client.HTTPResponse:
    """Begins to read long streamed answers; 64 of them are long in coming."""
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": 400, "n": answers, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    response = server.open("/v1/completions", json.dumps(body).encode())
    assert response.readline().startswith(b"data: ")
    return response


def test_a_client_and_bad_ones(deployed: Path, vllm_environment: Path, tmp_path: Path) -> None:
    from openai import BadRequestError, OpenAI

    port, name = free_port(), str(deployed)
    command = serve_command(deployed, vllm_environment, port)
    expected = greedy(deployed, PROMPT)
    assert expected.strip()
    with served(command, port, tmp_path / "log.txt") as server:
        log = server.log.read_text()
        assert f"served by vLLM at http://127.0.0.1:{port}/v1" in log.replace("\n", "")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [one.id for one in client.models.list()] == [name]
        given: Any = {"model": name, "max_tokens": TOKENS, "temperature": 0}
        assert client.completions.create(prompt=PROMPT, **given).choices[0].text == expected
        streamed = client.completions.create(prompt=PROMPT, stream=True, **given)
        pieces = [piece.choices[0].text for piece in streamed if piece.choices]
        assert "".join(pieces) == expected
        assert len([piece for piece in pieces if piece]) > 5
        chat: Any = [{"role": "user", "content": PROMPT}]
        answer = client.chat.completions.create(messages=chat, **given).choices[0].message
        assert answer.content == expected
        streamed = client.chat.completions.create(messages=chat, stream=True, **given)
        texts = [piece.choices[0].delta.content or "" for piece in streamed if piece.choices]
        assert "".join(texts) == expected

        with pytest.raises(BadRequestError, match="maximum context length"):
            client.completions.create(prompt="def f(x):\n" * 10_000, **given)
        code, text = server.status("/v1/completions", b'{"model": "')
        assert 400 <= code < 500, text
        code, text = server.status("/v1/completions", json.dumps({**given, "prompt": ""}).encode())
        assert code == 200 or (400 <= code < 500 and "prompt" in text), (code, text)
        code, text = server.status(
            "/v1/completions", json.dumps({**given, "model": "other", "prompt": "x"}).encode()
        )
        assert code == 404
        assert "other" in text

        read_a_little(server, name).close()
        assert server.complete(name, PROMPT) == expected

        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"must be free to listen on, got 127.0.0.1:{port}" in second.stderr
        assert server.complete(name, PROMPT) == expected

        # Cut short, an answer cannot be taken for a whole one.
        with read_a_little(server, name, answers=64) as response:
            server.kill()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
    with served(command, port, tmp_path / "again.txt") as server:
        assert server.complete(name, PROMPT) == expected
