"""What a training step of bench/train.py's blocks takes, side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from train_block import Block, describe
from train_memory import free

Row = dict[str, Any]
# precision, geometry, tokens
Cell = tuple[str, str, int]
WARM_UP = {"cpu": 1, "cuda": 3}
LEAST_ROUNDS = 3
PARTS = ("forward", "backward", "optimizer")
# How `describe` begins where the GPU's memory is too short.
NO_ROOM = torch.OutOfMemoryError.__name__


def measure_time(
    engines: list[str], cell: Cell, options: Any
) -> tuple[dict[str, Row], dict[str, str]]:
    """Returns the milliseconds of the parts of a step of each engine; and for those that fail, why.
    One for which there is no room beside the others is timed alone.
    """
    found, failed = _side_by_side(engines, cell, options)
    for name in engines if len(engines) > 1 else ():
        if failed.get(name, "").startswith(NO_ROOM):
            free()
            alone, why = _side_by_side([name], cell, options)
            found |= {one: {**time, "alone": True} for one, time in alone.items()}
            del failed[name]
            failed |= why
    return found, failed


def _make_blocks(
    engines: list[str], cell: Cell, options: Any
) -> tuple[dict[str, Block], dict[str, str]]:
    """Returns a block for each engine, warm, with weights of equal values; and for those that
    fail, why.
    """
    precision, geometry, tokens = cell
    if options.compile is not None:
        torch.compiler.reset()
    blocks: dict[str, Block] = {}
    failed: dict[str, str] = {}
    for name in engines:
        try:
            block = Block(name, geometry, precision, tokens, options.device)
            if options.compile is not None:
                block.compile(options.compile)
            block.step()
            blocks[name] = block
        except Exception as error:  # whatever a peer raises is the answer
            failed[name] = describe(error)
    return blocks, failed


def _side_by_side(
    engines: list[str], cell: Cell, options: Any
) -> tuple[dict[str, Row], dict[str, str]]:
    """Returns the same of interleaved steps, all blocks being there at once."""
    blocks, failed = _make_blocks(engines, cell, options)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in blocks}

    def run(name: str, count: int) -> dict[str, float] | None:
        """Returns the seconds of the last of several steps; None where one fails, which ends it."""
        try:
            return [asdict(blocks[name].step()) for _ in range(count)][-1]
        except Exception as error:  # as above
            failed[name] = describe(error)
        del blocks[name], steps[name]
        return None

    running = []
    taken = 0.0
    for name in [*blocks]:
        first = run(name, WARM_UP[options.device])
        if first is not None and sum(first.values()) > options.limit:
            steps[name].append(first)
        elif first is not None:
            running.append(name)
            taken += sum(first.values())
    affordable = options.cell_seconds / max(taken, 1e-9)
    for _ in range(int(min(options.rounds, max(LEAST_ROUNDS, affordable)))):
        for name in [name for name in running if name in blocks]:
            timed = run(name, 1)
            if timed is not None:
                steps[name].append(timed)
    return {name: _summarize(timed, cell[2]) for name, timed in steps.items()}, failed


def _summarize(timed: list[dict[str, float]], tokens: int) -> Row:
    parts = {part: 1e3 * np.array([step[part] for step in timed]) for part in PARTS}
    step = parts["forward"] + parts["backward"]
    whole = float(np.median(step + parts["optimizer"]))
    p10, p50, p90 = np.percentile(step, (10, 50, 90))
    return {
        **{f"{part}_ms": float(np.median(values)) for part, values in parts.items()},
        "step_ms": float(p50), "step_p10": float(p10), "step_p90": float(p90),
        "with_optimizer_ms": whole,
        "tokens_per_second": 1e3 * tokens / whole,
        "repeats": len(timed),
    }  # fmt: skip
