"""Times a whole mixture of experts: Qwen3-30B-A3B's geometry with random codes, through `generate`.

    python scripts/bench/experts_model.py --work models    # keeps 8.5 GB of checkpoint
    python scripts/bench/experts_model.py --quick          # a tiny one, to see that it runs

The checkpoint is written layer by layer, as packed codes; its weights never exist as floats. Each
measurement is a fresh process: load time with the file in the page cache and imports excluded,
prompt and decode speed, resident memory. `--llama` exports the same codes as GGUF (TQ2_0) and times
llama.cpp on it with as many threads. Writes experts_model.json and experts_model.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header
from generate import read_once, weight_files
from generate_worker import Clock, status
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitcore.kernels import kernels_for

Result = dict[str, Any]
FULL = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
QUICK = {
    **FULL,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
# The bytes of four codes none of which is the one that stands for no weight.
_LEGAL = np.array(
    [byte for byte in range(256) if all(byte >> shift & 3 != 3 for shift in (0, 2, 4, 6))], np.uint8
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, kept and reused")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="processes of each engine; default 3")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; default 512")
    parser.add_argument("--decode", type=int, help="tokens to generate; default 32")
    parser.add_argument("--llama", action="store_true", help="llama.cpp beside it, on a GGUF file")
    parser.add_argument("--json", type=Path, default=Path("out/bench/experts_model.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.geometry = QUICK if quick else FULL
    arguments.rounds = arguments.rounds or (1 if quick else 3)
    arguments.prompt = arguments.prompt or (32 if quick else 512)
    arguments.decode = arguments.decode or (6 if quick else 32)
    if arguments.decode < 3:
        parser.error("--decode must be at least 3")
    return arguments


def draw(name: str, pattern: Tensor, generator: np.random.Generator) -> Tensor:
    """Returns random values for a tensor of a packed file, of the pattern's shape and dtype."""
    shape, dtype = pattern.shape, pattern.dtype
    if not pattern.numel():
        return pattern
    if dtype == torch.uint8:
        return torch.from_numpy(_LEGAL[generator.integers(len(_LEGAL), size=shape, dtype=np.uint8)])
    if dtype == torch.int8:
        return torch.from_numpy(generator.integers(-127, 128, size=shape, dtype=np.int8))
    if name.endswith("_scale"):
        return torch.full(shape, 0.02 / 127 if name.startswith("lm_head") else 0.02, dtype=dtype)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    values = generator.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(0.02 * values).to(dtype)


def build_one_layer(geometry: dict[str, Any], folder: Path) -> Path:
    """Packs a model of one layer, whose file names the tensors of every other; returns its file."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from bitlab_hf import BitLabConfig, save

    fields = {**geometry, "num_hidden_layers": 1, "tie_word_embeddings": False}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    # Two experts are enough for the names: shapes of the others are made from them.
    small = {**fields, "num_experts": 2, "num_experts_per_tok": 1}
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**small)).save_pretrained(folder / "float")
    torch.set_default_dtype(default)
    config = BitLabConfig(mode="infer", head="int8", weight_granularity="per_tensor")
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    save(model, folder / "packed")
    return folder / "packed"


def build(geometry: dict[str, Any], target: Path) -> None:
    """Writes the packed checkpoint: one file for what stands outside of the layers, one a layer."""
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    weight_map: dict[str, str] = {}
    draft.mkdir(parents=True)
    generator = np.random.default_rng(0)
    layers, experts = geometry["num_hidden_layers"], geometry["num_experts"]

    def name_in(layer: int, name: str) -> str:
        return name.replace("model.layers.0.", f"model.layers.{layer}.")

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, draft / file, metadata=metadata)
        weight_map.update(dict.fromkeys(tensors, file))

    with tempfile.TemporaryDirectory() as place:
        made = build_one_layer(geometry, Path(place))
        fields = json.loads((made / "config.json").read_text())
        with safe_open(made / "model.safetensors", "pt") as file:
            patterns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    for name, pattern in patterns.items():
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            patterns[name] = pattern[:1].expand(experts, *pattern.shape[1:])
    named = json.loads(metadata["bitlab_layers"])
    inner = [name for name in named if "model.layers.0." in name]
    metadata["bitlab_layers"] = json.dumps(
        [name_in(layer, name) for layer in range(layers) for name in inner]
        + [name for name in named if name not in inner]
    )
    mark = {name for name, pattern in patterns.items() if not pattern.numel()}
    outer = {name: draw(name, one, generator) for name, one in patterns.items()
             if "model.layers." not in name}  # fmt: skip
    write("model-outer.safetensors", outer)
    for layer in range(layers):
        tensors = {
            name_in(layer, name): draw(name, one, generator) for name, one in patterns.items()
            if "model.layers." in name and (layer == 0 or name not in mark)
        }  # fmt: skip
        write(f"model-layer-{layer:02}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    fields |= geometry
    fields["num_local_experts"] = experts
    (draft / "config.json").write_text(json.dumps(fields, indent=1))
    draft.rename(target)


def export(folder: Path, target: Path) -> None:
    """Writes the same codes as GGUF, the head as bfloat16, with a vocabulary of no meaning."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from bitlab_hf.interop.gguf import export_gguf

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.lm_head.qweight * model.lm_head.qweight_scale[:, None]
    out_features, in_features = weight.shape
    model.lm_head = torch.nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
    model.lm_head.weight.data.copy_(weight)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "ab", *(f"word{index}" for index in range(len(weight) - 1 - len(alphabet)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    export_gguf(model, target, tokenizer=fast, pre_tokenizer="gpt-2")


def measure_bitlab(request: Result) -> Result:
    """Loads the checkpoint and generates: times, memory."""
    import transformers

    import bitlab_hf  # noqa: F401  (registers the quantizer)

    torch.set_num_threads(request["threads"])
    imported = status("VmRSS")
    started = time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(request["model"])
    load_seconds, loaded = time.perf_counter() - started, status("VmRSS")
    loading_peak = status("VmHWM")
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)

    def run(length: int, count: int) -> list[float]:
        """Returns the start, and when each of count tokens came."""
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        clock, started = Clock(), time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=count, pad_token_id=0, streamer=clock,
        )  # fmt: skip
        assert len(clock.times) == count + 1
        return [started, *clock.times[1:]]

    run(8, 2)  # maps the files' pages and starts the threads
    begin, first = run(request["prompt"], 1)
    return {
        "load_seconds": load_seconds, "imported_bytes": imported, "loaded_bytes": loaded,
        "loading_peak_bytes": loading_peak, "prompt_seconds": first - begin,
        "token_seconds": np.diff(run(16, request["decode"])[1:]).tolist(),
        "peak_bytes": status("VmHWM"),
        "parameters": model.num_parameters(),
        "layer": type(model.model.layers[0].mlp.experts).__name__,
    }  # fmt: skip


def measure_llama(request: Result) -> Result:
    """Loads the GGUF file in llama.cpp and generates: times, memory."""
    import llama_cpp

    imported, started = status("VmRSS"), time.perf_counter()
    threads, prompt = request["threads"], request["prompt"]
    model: Any = llama_cpp.Llama(
        request["model"], n_ctx=prompt + request["decode"] + 32, n_threads=threads,
        n_threads_batch=threads, n_batch=prompt, verbose=False,
    )  # fmt: skip
    load_seconds, loaded = time.perf_counter() - started, status("VmRSS")
    ids = np.random.default_rng(0).integers(0, model.n_vocab(), prompt).tolist()

    def run(length: int, count: int) -> list[float]:
        model.reset()
        times = [time.perf_counter()]
        for token, _ in zip(model.generate(ids[:length], temp=0.0), range(count), strict=False):
            assert token >= 0
            times.append(time.perf_counter())
        return times

    run(8, 2)
    begin, first = run(prompt, 1)
    return {
        "load_seconds": load_seconds, "imported_bytes": imported, "loaded_bytes": loaded,
        "loading_peak_bytes": loaded, "prompt_seconds": first - begin,
        "token_seconds": np.diff(run(16, request["decode"])[1:]).tolist(),
        "peak_bytes": status("VmHWM"),
    }  # fmt: skip


def run_worker(request: Result, threads: int) -> Result:
    """Does what the request says in a fresh process.

    Raises:
        SystemExit: It failed; the message holds what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps({**request, "threads": threads}))
        done = subprocess.run(
            [sys.executable, __file__, "--worker", str(path)], capture_output=True, text=True,
            check=False, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"experts_model.py failed:\n{done.stderr[-4000:]}")
        answer: Result = json.loads(path.read_text())
    return answer


def work(path: Path) -> None:
    """Answers a request in its own file."""
    request = json.loads(path.read_text())
    model = Path(request["model"])
    if request["do"] == "build":
        build(request["geometry"], model)
        answer: Result = {}
    elif request["do"] == "export":
        export(Path(request["source"]), model)
        answer = {}
    else:
        measure = {"bitlab": measure_bitlab, "llama.cpp": measure_llama}[request["engine"]]
        answer = measure(request)
    path.write_text(json.dumps(answer))


def summarize(engine: str, files: list[Path], runs: list[Result], prompt: int) -> Result:
    """Returns the figures of one engine: medians over its processes."""
    decode = [1 / seconds for run in runs for seconds in run["token_seconds"]]
    keys = ("load_seconds", "imported_bytes", "loaded_bytes", "loading_peak_bytes", "peak_bytes")
    return {
        "engine": engine,
        **{key: float(np.median([run[key] for run in runs])) for key in keys},
        "prompt_tok_s": float(np.median([prompt / run["prompt_seconds"] for run in runs])),
        "decode_tok_s": float(np.median(decode)),
        "decode_p10": float(np.percentile(decode, 10)),
        "decode_p90": float(np.percentile(decode, 90)),
        "file_bytes": sum(file.stat().st_size for file in files),
        "runs": runs,
    }


def main() -> None:
    """Builds, measures, prints, writes."""
    options = parse_arguments()
    if options.worker:
        work(options.worker)
        return
    console, disturbance = Console(), Disturbance()
    result = header(console, "bench/experts_model.py")
    with tempfile.TemporaryDirectory() as own:
        place = options.work or Path(own)
        place.mkdir(parents=True, exist_ok=True)
        name = "quick-experts" if options.quick else "qwen3-30b-a3b"
        models = {"bitlab": place / name}
        if not models["bitlab"].exists():
            console.print("writing the checkpoint")
            run_worker({"do": "build", "model": str(models["bitlab"]),
                        "geometry": options.geometry}, options.threads)  # fmt: skip
        if options.llama:
            models["llama.cpp"] = place / f"{name}.gguf"
            if not models["llama.cpp"].exists():
                console.print("writing the GGUF file")
                run_worker({"do": "export", "model": str(models["llama.cpp"]),
                            "source": str(models["bitlab"])}, options.threads)  # fmt: skip
        runs: dict[str, list[Result]] = {engine: [] for engine in models}
        for turn in range(options.rounds):
            for engine, model in models.items():
                console.print(f"{engine}: process {turn + 1} of {options.rounds}")
                request = {"do": "measure", "engine": engine, "model": str(model),
                           "prompt": options.prompt, "decode": options.decode}  # fmt: skip
                if engine == "bitlab":
                    read_once(model)
                runs[engine].append(run_worker(request, options.threads))
        found = [
            summarize(engine, weight_files(model) if model.is_dir() else [model], runs[engine],
                      options.prompt)
            for engine, model in models.items()
        ]  # fmt: skip
    columns = ["engine", "prompt/s", "decode/s", "p10-p90", "load s", "loaded", "peak", "file"]
    grid = Grid(
        f"Tokens/s (prompt of {options.prompt}) and GB, {options.threads} thread(s)", columns
    )
    for one in found:
        grid.rows.append([
            one["engine"], f"{one['prompt_tok_s']:.1f}", f"{one['decode_tok_s']:.2f}",
            f"{one['decode_p10']:.1f}-{one['decode_p90']:.1f}", f"{one['load_seconds']:.2f}",
            *(f"{one[key] / 1e9:.2f}" for key in ("loaded_bytes", "peak_bytes", "file_bytes")),
        ])  # fmt: skip
    grid.show(console)
    result |= {
        "isa": getattr(kernels_for("cpu"), "isa", "reference"), "threads": options.threads,
        "geometry": options.geometry, "prompt": options.prompt, "decode": options.decode,
        "rounds": options.rounds, "quick": options.quick, "engines": found,
    }  # fmt: skip
    targets = [
        Target("decode: 8 tok/s", found[0]["decode_tok_s"], 8, True, " tok/s"),
        Target("peak memory: at most 12 GB", found[0]["peak_bytes"] / 1e9, 12, False, " GB"),
    ]
    close(console, result, [grid], targets, disturbance, options.json)
    console.print(f"Results: {options.json}", highlight=False)


if __name__ == "__main__":
    main()
