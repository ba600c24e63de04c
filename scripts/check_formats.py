"""Writes a model in the formats that others run, reads each back, and asks their real readers.

For GGUF and compressed-tensors it prints a row: the size, by how much scales are rounded, whether
codes and multipliers come back equal, and, over teacher-forced tokens of a text, how often the
reader names the same most likely token as BitLab and the mean KL divergence in nats. A reader that
is not installed (llama-cpp-python, compressed-tensors) is left out, and said to be.

    python scripts/check_formats.py MODEL_FOLDER --text heldout.txt
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from check_compressed import compared, log_probabilities
from check_gguf import llama_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import (
    export_compressed_tensors,
    export_gguf,
    load_compressed_tensors,
    load_gguf,
)
from bitlab_hf.interop.matrices import matrices_of
from bitlab_hf.interop.packed_stream import relative_change


def come_back(model: Any, again: Any) -> str:
    """Says whether codes are equal, and by how much the scales of them differ at most."""
    held, other = ({one.key: one for one in matrices_of(each)} for each in (model, again))
    if held.keys() != other.keys():
        return f"other layers: {sorted(held.keys() ^ other.keys())[:2]}"
    change, matrices = 0.0, 0
    for key, ours in held.items():
        for (codes, scale), (theirs, found) in zip(ours, other[key], strict=True):
            if not torch.equal(codes, theirs):
                return f"other codes in {key}"
            columns = [_columns(one, len(codes)) for one in (scale, found)]
            groups = max(one.shape[1] for one in columns)
            spread = [one.repeat_interleave(groups // one.shape[1], 1) for one in columns]
            used = codes.view(len(codes), groups, -1).any(-1)
            change, matrices = max(change, relative_change(*spread, used)), matrices + 1
    return f"{matrices} matrices: codes equal, scales within {change:.3%}"


def _columns(scale: Tensor, rows: int) -> Tensor:
    """Returns scales [1], [N] or [N, K / G] as [N, 1] or [N, K / G]."""
    return scale if scale.dim() == 2 else scale.view(-1, 1).expand(rows, 1)


def size_of(place: Path) -> int:
    """Returns the bytes of a file, or of a folder's weights."""
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Runs the round trips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the model's folder, latent or deployed")
    parser.add_argument("--text", type=Path, help="a text file; without it no reader is asked")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--length", type=int, default=250, help="tokens of a block")
    parser.add_argument("--qtype", help="GGUF's type; default as `bitlab export` has it")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids: list[int] = []
    if options.text is not None:
        text = options.text.read_text()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    expected = log_probabilities(model, ids, options.length) if ids else torch.empty(0)

    def ask_llama(place: Path) -> Tensor:
        from llama_cpp import Llama

        llama = Llama(str(place), n_ctx=options.length + 64, logits_all=True, verbose=False)
        blocks = [ids[at : at + options.length] for at in range(0, len(ids), options.length)]
        return torch.cat([llama_logits(llama, block) for block in blocks]).log_softmax(-1)

    def ask_stock(place: Path) -> Tensor:
        stock = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        return log_probabilities(stock, ids, options.length)

    def write_gguf(place: Path) -> float:
        return export_gguf(model, place, options.qtype, tokenizer=tokenizer)

    def write_compressed(place: Path) -> float:
        return export_compressed_tensors(model, place, tokenizer=tokenizer)

    formats: list[tuple[str, str, Callable[[Path], float], Any, str, Any]] = [
        ("GGUF", "model.gguf", write_gguf, load_gguf, "llama_cpp", ask_llama),
        (
            "compressed-tensors", "compressed", write_compressed, load_compressed_tensors,
            "compressed_tensors", ask_stock,
        ),
    ]  # fmt: skip
    print("| format | MB | scales rounded by | read back by BitLab | read by its own reader |")
    print("|---|--:|--:|---|---|")
    for name, file, write, read, package, ask in formats:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / file
            change = write(place)
            again = read(place, group_scale_dtype="uint8", dtype=torch.float32)
            found = come_back(model, again)
            said = "not asked" if not ids else f"{package} is not installed"
            if ids and find_spec(package) is not None:
                said = compared(expected, ask(place))
            print(f"| {name} | {size_of(place) / 1e6:.1f} | {change:.3%} | {found} | {said} |")


if __name__ == "__main__":
    main()
