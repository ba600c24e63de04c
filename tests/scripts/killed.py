"""Runs a script in a process that is to be killed, the first time that torchrun starts it.

    torchrun ... killed.py RANK WHEN SCRIPT ...

WHEN is ``stepping``, between two checkpoints, or ``saving``, with half a checkpoint written.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

from transformers import Trainer, TrainerCallback, trainer

STEP = 14
SAVED_STEP = 20


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DiesStepping(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP:
            die()


def die_saving() -> None:
    save = Trainer._save_optimizer_and_scheduler

    def dies(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == SAVED_STEP:
            die()
        save(self, output_dir)

    Trainer._save_optimizer_and_scheduler = dies


def main() -> None:
    rank, when, script, *rest = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if when == "saving":
            die_saving()
        else:
            trainer.DEFAULT_CALLBACKS.append(DiesStepping)
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
