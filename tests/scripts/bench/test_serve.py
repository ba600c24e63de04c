"""The load test's client and figures, against a server that is known."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "scripts/bench"


class Handler(BaseHTTPRequestHandler):
    """Streams the prompt's words, one every 50 ms; a prompt of "bad" is an error."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        self.send_response(500 if prompt == "bad" else 200)
        self.end_headers()
        if prompt == "bad":
            self.wfile.write(b"no")
            return
        for word in prompt.split()[: body["max_tokens"]]:
            time.sleep(0.05)
            piece = json.dumps({"choices": [{"text": f"{word} "}]})
            self.wfile.write(f"data: {piece}\n\n".encode())
            self.wfile.flush()
            if word == "cut":
                self.wfile.write(b"data: {\n\n")
                return
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    monkeypatch.syspath_prepend(str(BENCH))
    import serve
    import serve_load

    yield serve, serve_load
    for name in ("serve", "serve_load", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_round(modules: tuple[Any, Any], port: int) -> None:
    serve, load = modules
    server = load.Server(port, "model", os.getpgid(0))
    given = ["one two three", "four", "bad", "five cut six"]
    alone = ["one two ", "another", "", "five cut "]
    found = serve.measure(server, given, 2, lambda text: len(text.split()), alone)
    assert found["texts"] == ["one two ", "four ", "", "five cut "]
    assert [error[:3] for error in found["errors"]] == ["500", "JSO"]
    assert found["alone"] == 1
    assert found["first"][0] == pytest.approx(0.05, abs=0.5)
    assert found["first"][0] >= 0.05
    assert found["between"][0] >= 0.04
    assert 0 < found["tokens_per_second"] < 5 / 0.1
    assert found["memory"] > 10**7
    line = serve.row("name", found, ["one two ", "four ", "x", "y"])
    assert line[:2] == ["name", "4"]
    assert line[-3:] == ["2", "1/4", "2/4"]


def test_a_server_that_is_gone_is_an_error(modules: tuple[Any, Any]) -> None:
    answer = modules[1].Server(1, "model", 0).ask("one", 2)
    assert "refused" in answer.error
    assert not answer.times


def test_prompts_differ_in_length(modules: tuple[Any, Any]) -> None:
    found = modules[0].prompts(32)
    assert len(set(found)) == 32
    lengths = sorted(map(len, found))
    assert lengths[-1] > 3 * lengths[0]
