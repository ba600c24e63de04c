"""Fine-tuning on the workers of a Ray cluster: `scripts/finetune.py`, started by Ray Train.

    python scripts/finetune_ray.py --workers 2 --model MODEL --data book.txt --output out/mine

Options that finetune.py has beside these go to it. Every machine needs BitLab, the model and the
data under the same paths; OUTPUT is a folder that all share. Wants `pip install "ray[train]"`.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

SCRIPT = Path(__file__).resolve().with_name("finetune.py")


def work(given: dict[str, Any]) -> None:
    """Runs the script in one worker, where Ray has joined the processes already."""
    os.chdir(given["folder"])
    sys.argv = [given["script"], *given["arguments"]]
    runpy.run_path(given["script"], run_name="__main__")


def main() -> None:
    """Starts the workers, and again after one has died."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes on the cluster")
    parser.add_argument("--failures", type=int, default=1, help="starts after one that failed")
    parser.add_argument("--model", required=True, help="folder or hub name of a float model")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders, or a dataset")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    given, rest = parser.parse_known_args()
    output = str(given.output.resolve())
    arguments = ["--model", given.model, "--data", *given.data, "--output", output, *rest]
    arguments += ["--cpu"] * given.cpu
    TorchTrainer(
        work,
        train_loop_config={
            "script": str(SCRIPT), "folder": os.getcwd(), "arguments": arguments,
        },
        torch_config=TorchConfig(backend="gloo" if given.cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        run_config=RunConfig(
            storage_path=f"{output}/ray",
            failure_config=FailureConfig(max_failures=given.failures),
        ),
    ).fit()  # fmt: skip


if __name__ == "__main__":
    main()
