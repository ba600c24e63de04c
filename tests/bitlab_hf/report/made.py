"""A run's folder, made up: what a Trainer with statistics leaves, without the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bitlab_hf.train.baseline import write_baseline
from bitlab_hf.train.recipe import RECIPES
from bitlab_hf.train.statistics_files import RunFiles

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
BINS = 60


def layer_names(blocks: int) -> list[str]:
    return [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]


def make_run(
    folder: Path, *, blocks: int = 2, logs: int = 12, name: str = "made up", baseline: bool = True
) -> Path:
    """Writes a run with a log every 5 steps, evaluated at every fourth of them."""
    layers = layer_names(blocks)
    facts: dict[str, Any] = {
        "name": name, "model": name, "architecture": "LlamaForCausalLM", "parameters": 5_000_000,
        "ternary_weights": 3_000_000, "scheme": {"weight_quantizer": "absmean"},
        "arguments": {"learning_rate": 0.001, "bf16": False}, "versions": {"torch": "2"},
        "max_steps": 5 * logs,
    }  # fmt: skip
    files = RunFiles(folder, layers, 0, facts)
    history: list[dict[str, Any]] = []
    for place in range(logs + 1):
        step, left = 5 * place, 1 - place / logs
        if place % 4 == 0:
            history.append({"step": step, "eval_loss": 2.2 + 2 * left, "epoch": place / logs})
            files.add(step, history[-1], {})
        if place == 0:
            continue
        values: dict[str, list[float | None]] = {
            "negative": [0.3 + 0.001 * n for n in range(len(layers))],
            "zero": [0.4 - 0.002 * n for n in range(len(layers))],
            "positive": [0.3 + 0.001 * n for n in range(len(layers))],
            "flipped": [0.02 * left + 1e-4 * n for n in range(len(layers))],
            "scale": [0.02 * (1 + 0.1 * place / logs) for _ in layers],
            "saturated": [0.004 + 0.001 * (n % 3) for n in range(len(layers))],
            "input_max": [4.0 + n for n in range(len(layers))],
        }
        logged = {"loss": 1.0 + left, "learning_rate": 1e-3 * left}
        totals = {f"ternary/{key}": row[0] for key, row in values.items() if key != "scale"}
        history.append({"step": step, **logged, **totals})
        files.add(step, logged, values)
    for step in (0, 5 * logs):
        rows = [[int(1000 * math.exp(-(((n - 30) / 12) ** 2))) for n in range(BINS)]] * 3
        counts = [
            [count if code == (n >= 35) - (n < 25) else 0 for n, count in enumerate(row)]
            for code, row in zip((-1, 0, 1), rows, strict=True)
        ]
        files.add_histograms(step, {"edge": 3.0, "bins": BINS}, dict.fromkeys(layers, counts))
    state = {
        "global_step": 5 * logs, "max_steps": 5 * logs, "num_input_tokens_seen": 1024 * logs,
        "log_history": history,
    }  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(state))
    RECIPES["distill"].save(folder)
    if baseline:
        write_baseline(folder, 2.0, "original")
    return folder
