"""What a fresh process does: load a folder, write logits for every thread count and backend.

Run as ``python -m tests.bitlab_hf.fresh MODEL ARCHITECTURE OUTPUT``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import bitcore
import bitlab_hf  # noqa: F401  (registers the quantizer)
from tests import processes
from tests.bitlab_hf.models import auto_class, logits_of, token_ids

COMBINATIONS = [(threads, backend) for threads in (1, 2) for backend in ("cpu", "reference")]


def outputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits and greedy tokens for each thread count and backend."""
    outputs = {}
    before = torch.get_num_threads()
    for threads, backend in COMBINATIONS:
        torch.set_num_threads(threads)
        with bitcore.use_backend(backend):
            logits = logits_of(model)
            outputs[f"logits {threads} {backend}"] = logits
            if model.can_generate() and not model.training:
                ids = token_ids()[:1, :8]
                tokens = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
                )
            else:
                tokens = logits.argmax(-1)
            outputs[f"tokens {threads} {backend}"] = tokens
    torch.set_num_threads(before)
    return outputs


def fresh_outputs(folder: Path, name: str) -> dict[str, Tensor]:
    """Runs `outputs_of` in a new process on a saved model."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "outputs.safetensors"
        done = processes.run("-m", "tests.bitlab_hf.fresh", folder, name, output)
        assert done.returncode == 0, done.stderr
        return dict(load_file(output))


def _main() -> None:
    folder, name, output = sys.argv[1:]
    model = auto_class(name).from_pretrained(folder)
    save_file({k: v.contiguous() for k, v in outputs_of(model).items()}, output)


if __name__ == "__main__":
    _main()
