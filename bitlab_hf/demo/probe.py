"""Measures one model from a folder, in a process of its own.

``python -m bitlab_hf.demo.probe MODEL REQUEST`` reads a JSON request, loads the model as any user
would, and
writes its answer where the request says: logits for given tokens, generated text, load time,
resident memory and decoding speed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What a probe found.

    Attributes:
        load_seconds: Time of ``from_pretrained``.
        resident_bytes: Growth of the process's resident memory by loading and one forward pass.
        tokens_per_second: Median greedy decoding speed.
        texts: Continuation of each prompt.
    """

    load_seconds: float
    resident_bytes: int
    tokens_per_second: float
    texts: list[str]


def probe(
    model: Path, ids: Tensor, prompts: list[str], tokens: int, threads: int
) -> tuple[Answer, Tensor]:
    """Runs the probe in a fresh process.

    Args:
        model: The folder.
        ids: int64 [1, length]: the tokens to give logits for.
        prompts: Texts to continue greedily.
        tokens: Tokens to generate for each.
        threads: Threads of the process.

    Returns:
        The answer and the logits [1, length, vocabulary].

    Raises:
        RuntimeError: The process failed; the message holds what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(
            json.dumps(
                {"ids": ids.tolist(), "prompts": prompts, "tokens": tokens, "threads": threads}
            )
        )
        command = [sys.executable, "-m", "bitlab_hf.demo.probe", str(model), str(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the fresh process failed:\n{done.stderr[-4000:]}")
        from safetensors.torch import load_file

        logits = load_file(request.with_suffix(".safetensors"))["logits"]
        answer = json.loads(request.with_suffix(".answer").read_text())
    return Answer(**answer), logits


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def _main() -> None:
    model_path, request_path = Path(sys.argv[1]), Path(sys.argv[2])
    request = json.loads(request_path.read_text())
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bitlab_hf  # noqa: F401  (registers the quantizer)

    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    # The first forward pass of a process costs memory that no model is to blame for.
    torch.nn.Linear(64, 64, dtype=torch.bfloat16)(torch.zeros(64, 64, dtype=torch.bfloat16))
    before = _resident()
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=False)
    load_seconds = time.perf_counter() - started
    ids = torch.tensor(request["ids"])
    with torch.no_grad():
        model(input_ids=ids[:, :16])
        resident = _resident() - before
        logits = model(input_ids=ids).logits
    texts: list[str] = []
    speeds: list[float] = []
    for prompt in request["prompts"]:
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        started = time.perf_counter()
        output = model.generate(
            **encoded,
            do_sample=False,
            min_new_tokens=request["tokens"],
            max_new_tokens=request["tokens"],
        )
        speeds.append(request["tokens"] / (time.perf_counter() - started))
        texts.append(str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :])))
    save_file({"logits": logits.contiguous()}, request_path.with_suffix(".safetensors"))
    answer = Answer(load_seconds, resident, statistics.median(speeds), texts)
    request_path.with_suffix(".answer").write_text(json.dumps(asdict(answer)))


if __name__ == "__main__":
    _main()
