"""One step of bench/generate.py in a process of its own: builds a checkpoint or measures one.

Reads a JSON request from its argument and writes the answer beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitNetConfig
from transformers.generation.streamers import BaseStreamer
from transformers.models.bitnet.modeling_bitnet import BitNetForCausalLM

Request = dict[str, Any]


def build_dense(request: Request, target: Path) -> None:
    """Writes a bfloat16 model with random weights, made where it is measured."""
    torch.manual_seed(0)
    config = BitNetConfig(**request["geometry"], tie_word_embeddings=True, dtype="bfloat16")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(request["device"]):
        model = BitNetForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(target, max_shard_size="100GB")


def build_bitlab(request: Request, target: Path) -> None:
    """Packs the dense model while it loads, and saves it deployed."""
    from bitlab_hf import BitLabConfig, save

    size = request.get("group_size")
    granularity = "per_tensor" if size is None else "per_group"
    config = BitLabConfig(
        mode="infer", head=request["head"], weight_granularity=granularity, group_size=size
    )
    model = AutoModelForCausalLM.from_pretrained(request["source"], quantization_config=config)
    save(model, target)


def build_bitnet(request: Request, target: Path) -> None:
    """Writes BitLab's file (head kept) as a packed checkpoint of transformers' own `bitnet`."""
    source = Path(request["source"])
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            module, _, leaf = name.rpartition(".")
            tensor = file.get_tensor(name)
            if leaf == "qweight":
                tensors[f"{module}.weight"] = tensor
            elif leaf == "qweight_scale":
                tensors[f"{module}.weight_scale"] = (1 / tensor).bfloat16()  # this class divides
            elif tensor.numel():  # BitLab's mark against loads without it is empty
                tensors[name] = tensor
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2))


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token arrives; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing."""


def status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def bits_per_weight(model: Any, kind: str) -> float:
    """Returns the bits that each weight of the linear layers takes, scales included."""
    if kind == "bitlab":
        from bitlab_hf.model.count import bits_per_weight

        return bits_per_weight(model)
    return 2.0 if kind == "bitnet" else 16.0


def load(request: Request) -> tuple[Any, dict[str, Any]]:
    """Loads a checkpoint; returns the model, and the time and what was resident before."""
    if request["kind"] == "bitlab":
        import bitlab_hf.api  # noqa: F401  (registers the quantizer)

    device = request["device"]
    torch.set_num_threads(request["threads"])
    imported = status("VmRSS")
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.bfloat16, device_map=None if device == "cpu" else device
    )
    return model, {"load_seconds": time.perf_counter() - started, "imported_bytes": imported}


def measure(request: Request) -> dict[str, Any]:
    """Loads a checkpoint and generates: times, memory."""
    kind, device = request["kind"], request["device"]
    if device == "cpu":
        # transformers compiles parts of its bitnet layer, which makes them slower on a CPU.
        torch.compiler.set_stance("force_eager")
    model, loaded = load(request)
    compiling, cache = request.get("compile"), request["cache"]
    if compiling is not None:
        from bitlab_hf import compile_decoding

        compile_decoding(model, exact=compiling == "exact")
        cache = "static"
    model.generation_config.eos_token_id = None
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def run(length: int, count: int) -> list[float]:
        """Returns the start, and when each of count tokens came."""
        ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
        clock = Clock()
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
            cache_implementation=None if cache == "dynamic" else cache,
        )
        assert output.shape[1] == length + count
        return [started, *clock.times[1:]]

    started = time.perf_counter()
    if device == "cpu":
        run(8, 2)  # maps the file's pages, starts the threads, compiles or loads what was compiled
    else:
        # Compiles for the cache's length that is measured below, and records the graph.
        run(request["prompt"], 1)
        for _ in range(2):
            run(16, request["decode"])
    warm_seconds = time.perf_counter() - started
    prompts = []
    for _ in range(request["prompt_repeats"]):
        begin, first = run(request["prompt"], 1)
        prompts.append(first - begin)
    arrived = run(16, request["decode"])[1:]
    gaps = [after - before for before, after in pairwise(arrived)]
    return {
        **loaded,
        "warm_seconds": warm_seconds,
        "prompt_seconds": prompts,
        "token_seconds": gaps,
        "peak_bytes": status("VmHWM"),
        "bits_per_weight": bits_per_weight(model, kind),
        "layer": type(model.model.layers[0].mlp.up_proj).__name__,
        "head": type(model.lm_head).__name__,
        "compiled": compiling or getattr(model, "_compiled_call", None) is not None,
    }


def main() -> None:
    """Does what the request says."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text())
    builders = {"dense": build_dense, "bitlab": build_bitlab, "bitnet": build_bitnet}
    answer: dict[str, Any] = {}
    if request["do"] == "build":
        target = Path(request["model"])
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        builders[request["kind"]](request, draft)
        draft.rename(target)
    elif request["do"] == "load":
        _, answer = load(request)
    else:
        answer = measure(request)
    path.with_suffix(".answer").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
