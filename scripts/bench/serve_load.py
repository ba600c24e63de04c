"""A server under load: started, asked by many at once, measured, ended."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitcore.kernels.native import library_path

# A server may compile first.
_START_SECONDS = 1800
_ANSWER_SECONDS = 1800


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        text: What came.
        times: Seconds from the request to each piece that holds text.
        tokens: How many the server says it made.
        error: What went wrong, if anything.
    """

    text: str = ""
    tokens: int = 0
    times: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        port: Where it listens, on loopback.
        model: What requests call the model.
        group: Its process group.
    """

    port: int
    model: str
    group: int

    def ask(self, prompt: str, tokens: int) -> Answer:
        """Streams a greedy completion of so many tokens."""
        answer, started = Answer(), time.perf_counter()
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                answer.error = f"{response.status}: {response.read()[:300]!r}"
                return answer
            for line in response:
                content = line.decode().strip().removeprefix("data: ")
                if not line.startswith(b"data: ") or content == "[DONE]":
                    continue
                event = json.loads(content)
                if usage := event.get("usage"):
                    answer.tokens = usage["completion_tokens"]
                choices = event.get("choices") or [{}]
                if piece := choices[0].get("text"):
                    answer.text += piece
                    answer.times.append(time.perf_counter() - started)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = repr(error)
        finally:
            connection.close()
        return answer

    def ask_all(
        self, prompts: Sequence[str], clients: int, tokens: int
    ) -> tuple[list[Answer], float]:
        """Asks all prompts, by so many clients at once, each of which takes the next when it has
        its answer; returns the answers and the seconds until the last has come.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda prompt: self.ask(prompt, tokens), prompts))
        return answers, time.perf_counter() - started

    def memory(self) -> int:
        """Bytes of all processes of the server, a page that several share divided among them."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                lines = (folder / "smaps_rollup").read_text() if group == self.group else ""
            except OSError:
                # It has ended meanwhile, or is another user's.
                continue
            total += sum(
                int(line.split()[1]) * 1024 for line in lines.splitlines() if line[:4] == "Pss:"
            )
        return total


@contextmanager
def running(model: Path, options: Sequence[str], log: Path, threads: int) -> Iterator[Server]:
    """Runs ``bitlab serve`` with these options on a free port until the block ends.

    Raises:
        SystemExit: It does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    bitlab = Path(sys.executable).with_name("bitlab")
    command: list[Any] = [bitlab, "serve", model, "--port", str(port), *options]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM's environment can hold BitLab without its libraries.
        "BITLAB_LIBRARY_DIR": str(library_path("cpu").parent),
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "HF_HUB_OFFLINE": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = Server(port, str(model), process.pid)
    try:
        end = time.monotonic() + _START_SECONDS
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: see {log}")
            time.sleep(0.5)
        yield server
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        except ProcessLookupError:
            process.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
            return True
    except OSError:
        return False
