"""A server under load: started, asked by many at once, measured, ended."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A server may compile first.
_START_SECONDS = 1800
_ANSWER_SECONDS = 1800


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        text: What came.
        times: Seconds from the request to each piece that holds text.
        error: What went wrong, if anything.
    """

    text: str = ""
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
            "stream": True,
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
                choices = json.loads(content).get("choices") or [{}]
                if piece := choices[0].get("text"):
                    answer.text += piece
                    answer.times.append(time.perf_counter() - started)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = repr(error)
        finally:
            connection.close()
        return answer

    def ask_all(self, prompts: Sequence[str], tokens: int) -> tuple[list[Answer], float]:
        """Asks all prompts at once; returns the answers and the seconds until the last has come."""
        answers = [Answer()] * len(prompts)

        def ask(index: int) -> None:
            answers[index] = self.ask(prompts[index], tokens)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, time.perf_counter() - started

    def memory(self) -> int:
        """Resident bytes of all processes of the server, shared pages counted once each process."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                # It has ended meanwhile.
                continue
            if int(fields[2]) == self.group:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return total


@contextmanager
def running(model: Path, options: Sequence[str], log: Path) -> Iterator[Server]:
    """Runs ``bitlab serve`` with these options on a free port until the block ends.

    Raises:
        SystemExit: It does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    bitlab = Path(sys.executable).with_name("bitlab")
    command: list[Any] = [bitlab, "serve", model, "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
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
