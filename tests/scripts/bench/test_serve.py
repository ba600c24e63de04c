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
from typing import Any, ClassVar

import pytest

BENCH = Path(__file__).parents[3] / "scripts/bench"


class Handler(BaseHTTPRequestHandler):
    """Streams the prompt's words, one every 50 ms; a prompt of "bad" is an error."""

    active: ClassVar[list[int]] = [0]
    lock = threading.Lock()

    def do_POST(self) -> None:
        with self.lock:
            self.active.append(self.active[-1] + 1)
        self.answer()
        with self.lock:
            self.active.append(self.active[-1] - 1)

    def answer(self) -> None:
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
        words = min(len(prompt.split()), body["max_tokens"])
        asked = body["stream_options"]["include_usage"]
        usage = json.dumps(
            {"choices": [], "usage": {"completion_tokens": words} if asked else None}
        )
        self.wfile.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())

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


QUESTIONS = ["one two three", "four", "bad", "five cut six"]


def test_a_round(modules: tuple[Any, Any], port: int) -> None:
    serve, load = modules
    server = load.Server(port, "model", os.getpgid(0))
    found = serve.measure(server, QUESTIONS, 3, 2)
    assert found["texts"] == ["one two ", "four ", None, None]
    assert [error[:3] for error in found["errors"]] == ["500", "JSO"]
    assert found["first"][0] == pytest.approx(0.05, abs=0.5)
    assert found["first"][0] >= 0.05
    # A client that gets to read late has two pieces at once.
    assert 0 < found["between"][0] <= found["between"][1]
    # An answer that is cut off counts none.
    assert found["tokens"] == 3
    assert found["seconds"] >= 0.1
    assert found["memory"] > 10**7
    # An error is no answer, not even to another error.
    alone = {"texts": ["one two ", "another", None, "five cut "]}
    line = serve.row(serve.figures("name", found, alone, None))
    assert line[:2] == ["name", "3"]
    assert line[-3:] == ["2", "1/4", "-"]


def test_an_empty_answer_is_one(modules: tuple[Any, Any]) -> None:
    assert modules[0].equal(["", "a", None, None], ["", "b", None, ""]) == 1


@pytest.mark.parametrize("clients", [1, 3])
def test_so_many_clients_ask_at_once(
    modules: tuple[Any, Any], port: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "active", [0])
    server = modules[1].Server(port, "model", os.getpgid(0))
    answers, seconds = server.ask_all(["a b c d e f"] * 6, clients, 6)
    assert [one.text for one in answers] == ["a b c d e f "] * 6
    assert max(Handler.active) <= clients
    assert max(Handler.active) > 1 or clients == 1
    assert seconds >= 6 * 6 * 0.05 / clients


def test_a_run_goes_on_where_it_was_stopped(modules: tuple[Any, Any], tmp_path: Path) -> None:
    serve, path = modules[0], tmp_path / "new/serve.json"
    results = serve.Results(path, {"tokens": 2})
    assert results.missing("a", [1, 8]) == [1, 8]
    found = {
        "clients": 1, "seconds": 2.0, "tokens": 5, "first": (0.1, 0.2), "between": (0.1, 0.2),
        "memory": 10**9, "errors": ["x"], "texts": ["y", "z"],
    }  # fmt: skip
    results.add("a", found)
    results.add("a", {**found, "clients": 8, "texts": ["y", "other"]})
    again = serve.Results(path, {"tokens": 2})
    assert again.missing("a", [1, 8, 32]) == [32]
    assert again.missing("b", [1]) == [1]
    assert again.errors() == 2
    lines = [serve.row(one) for one in again.rows()]
    assert [line[-2:] for line in lines] == [["-", "-"], ["1/2", "-"]]
    assert lines[0][:5] == ["a", "1", "2.5", "0.100 s", "0.200 s"]
    # Of other questions nothing is taken over.
    assert serve.Results(path, {"tokens": 3}).missing("a", [1, 8]) == [1, 8]
    assert [file.name for file in path.parent.iterdir()] == ["serve.json"]


def test_texts_are_compared_across_servers_of_one_model(
    modules: tuple[Any, Any], tmp_path: Path
) -> None:
    serve = modules[0]
    results = serve.Results(tmp_path / "serve.json", {})
    found = {
        "seconds": 2.0, "tokens": 5, "first": (0.1, 0.2), "between": (0.1, 0.2),
        "memory": 10**9, "errors": [],
    }  # fmt: skip
    for name, texts in ((serve.REFERENCE, ["", "z"]), ("vLLM, ternary", ["", "y"])):
        for clients in (1, 8):
            results.add(name, {**found, "clients": clients, "texts": texts})
    results.add(serve.DENSE, {**found, "clients": 1, "texts": ["", "z"]})
    assert [(one["as_one_by_one"], one["as_transformers"]) for one in results.rows()] == [
        (None, None), (2, 2), (None, 1), (2, 1), (None, None),
    ]  # fmt: skip


def test_a_server_that_is_gone_is_an_error(modules: tuple[Any, Any]) -> None:
    answer = modules[1].Server(1, "model", 0).ask("one", 2)
    assert "refused" in answer.error
    assert not answer.times


def test_prompts_differ_in_length(modules: tuple[Any, Any]) -> None:
    found = modules[0].prompts(32)
    assert len(set(found)) == 32
    lengths = sorted(map(len, found))
    assert lengths[-1] > 3 * lengths[0]


def test_a_geometry_of_random_weights(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = modules[0]
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    monkeypatch.setitem(serve.GEOMETRIES, "tiny", sizes)
    source = serve.random_model(serve.DEMO, "tiny", tmp_path / "float")
    folder = serve.pack(source, tmp_path / "ternary")
    model = serve.AutoModelForCausalLM.from_pretrained(folder)
    asked = serve.AutoTokenizer.from_pretrained(folder)("one two", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] == asked["input_ids"].shape[1] + 5
    assert model.config.hidden_size == 64
