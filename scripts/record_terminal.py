"""Runs BitLab's commands in a pseudo-terminal and draws what it showed as an SVG.

    bitlab demo --output out/demo
    python scripts/record_terminal.py out/demo docs/images/terminal.svg

Nothing is retouched: the commands run one after another on the demo's model, and the picture holds
what was on the screen at the end, colours included.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
from pathlib import Path

import torch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.model.tree import quantized_layers

WIDTH = 100
PROMPT = "\x1b[1;32m$\x1b[0m "
# Command and what is typed into it.
SESSION = (
    ("bitlab info demo", ""),
    ("bitlab convert ternary-in-floats packed", ""),
    ("bitlab eval demo --text operator.py", ""),
    ("bitlab chat demo --max-tokens 40 --temperature 0", "class Stack:\n/quit\n"),
)
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """The lines of a terminal, as far as progress bars need one: up, erase, and start of line."""

    def __init__(self) -> None:
        self._lines = [""]
        self._row = 0
        self._fresh = False

    def write(self, content: str) -> None:
        """Takes what a program sent."""
        for match in _TOKEN.finditer(content):
            numbers, letter, back, down, words = match.groups()
            if back:
                self._fresh = True
            elif down:
                self._row += 1
                self._fresh = False
                if self._row == len(self._lines):
                    self._lines.append("")
            elif letter == "A":
                self._row = max(0, self._row - int(numbers or 1))
            elif letter == "K":
                self._lines[self._row] = ""
            elif letter == "m" or words:
                # After a carriage return the line is written anew, from its start.
                if self._fresh and words:
                    self._lines[self._row] = ""
                self._fresh = self._fresh and not words
                self._lines[self._row] += match.group()

    def text(self) -> str:
        """Returns what is on the screen, with the sequences of its colours."""
        return "\n".join(self._lines).rstrip()


def run(command: str, typed: str, folder: Path, screen: Screen) -> None:
    """Runs a command on a pseudo-terminal and writes what comes out onto the screen.

    Raises:
        SystemExit: The command failed.
    """
    screen.write(f"{PROMPT}{command}\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    process = subprocess.Popen(
        shlex.split(command), stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
        env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    waiting = typed.splitlines(keepends=True)
    received = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 0.2)
        try:
            part = os.read(ours, 65536) if ready else b""
        except OSError:  # Linux says so when the other side is closed.
            break
        received += part
        if waiting and received.endswith(b"> "):
            os.write(ours, waiting.pop(0).encode())
        if not part and process.poll() is not None:
            break
    os.close(ours)
    screen.write(received.decode(errors="replace").rstrip("\r\n") + "\n\n")
    if process.wait() != 0:
        raise SystemExit(f"{command} failed:\n{received.decode(errors='replace')}")


def unpack(model: Path, target: Path) -> None:
    """Writes a deployed model as floats that are exactly ternary, the way some are published."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    state = load_file(model / "model.safetensors")
    for found in quantized_layers(loaded):
        name = found.names[0]
        for leaf in found.module.packed_tensors():
            del state[f"{name}.{leaf}"]
        state[f"{name}.weight"] = found.module.dequantized_weight(torch.float32)
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = loaded.config
    del config.quantization_config
    config.save_pretrained(target)


def draw(content: str, title: str) -> str:
    """Returns an SVG of a terminal that fetches no font."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    console.print(Text.from_ansi(content))
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    # A fixed id: the same session gives the same file.
    return console.export_svg(title=title, code_format=form, unique_id="terminal")


def main() -> None:
    """Runs the session and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the folder that bitlab demo wrote")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    screen = Screen()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "demo").symlink_to(arguments.model.resolve())
        (folder / "operator.py").symlink_to(Path(sysconfig.get_path("stdlib")) / "operator.py")
        unpack(arguments.model, folder / "ternary-in-floats")
        for command, typed in SESSION:
            run(command, typed, folder, screen)
    write_atomically(arguments.picture, draw(screen.text(), "BitLab") + "\n")


if __name__ == "__main__":
    main()
