"""Runs in vLLM's environment: what vLLM generates from folders, as JSON lines.

python worker.py '{"jobs": [{"folder": ..., "processes": 1, "expert_parallel": false}],
                   "compiled": false, "spread": false}'
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def know(architecture: str) -> None:
    """Registers a class of vLLM's by itself, which vLLM would look at in a process of its own."""
    from vllm.model_executor.models.registry import ModelRegistry

    lazy: Any = ModelRegistry.models[architecture]
    ModelRegistry.register_model(architecture, lazy.load_model_cls())


def generate(folder: Path, processes: int, expert_parallel: bool, compiled: bool) -> dict[str, Any]:
    """Returns greedy tokens and log-probabilities for the prompts of ``answers.json``."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    config = json.loads((folder / "config.json").read_text())
    know(*config["architectures"])
    model = LLM(
        str(folder), skip_tokenizer_init=True, max_model_len=128, max_num_seqs=8, seed=0,
        tensor_parallel_size=processes, dtype=config["dtype"], enforce_eager=not compiled,
        enable_prefix_caching=False, enable_expert_parallel=expert_parallel,
    )  # fmt: skip
    expected = json.loads((folder / "answers.json").read_text())
    sampling = SamplingParams(
        temperature=0, max_tokens=len(expected["greedy"][0]), ignore_eos=True, logprobs=0,
        prompt_logprobs=0, detokenize=False,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in expected["prompts"]]
    found = model.generate(prompts, sampling, use_tqdm=False)
    greedy, logs = [], []
    for prompt, one in zip(expected["prompts"], found, strict=True):
        tokens = list(one.outputs[0].token_ids)
        greedy.append(tokens)
        places = zip(prompt[1:], one.prompt_logprobs[1:], strict=True)
        values = [given[token].logprob for token, given in places]
        places = zip(tokens, one.outputs[0].logprobs, strict=True)
        logs.append(values + [given[token].logprob for token, given in places])
    model.llm_engine.engine_core.shutdown()
    return {"greedy": greedy, "logprobs": logs}


def main() -> None:
    given = json.loads(sys.argv[1])
    jobs = given["jobs"]
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    # The engine in this process: vLLM is imported once for all models.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if given["spread"]:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    for job in jobs:
        folder = Path(job["folder"])
        try:
            result = generate(folder, job["processes"], job["expert_parallel"], given["compiled"])
        except Exception as error:
            result = {"error": str(error), "trace": traceback.format_exc()}
        print(json.dumps({"name": folder.name, **result}), flush=True)
        gc.collect()
    others = [name for name in ("bitlab_hf", "bitlayers") if name in sys.modules]
    print(json.dumps({"name": "imported", "others": others}), flush=True)


if __name__ == "__main__":
    main()
