"""What keeps a run safe: where a value stopped being finite, and whole checkpoints only."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlayers.gathered import GatheredWeight

_STATE = "trainer_state.json"
_EARLIER = "earlier_runs.json"

# What a process found, after the number of things it looked at before: the least one is the first.
Finding = tuple[int, str]


def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> Finding | None:
    """Runs a forward pass again and says which layer's values went non-finite first.

    Args:
        model: Whose modules are watched, for this pass only.
        forward: Runs it.

    Returns:
        ``"the weights (and so the scale) of NAME"`` or ``"the activations of NAME"``; None if all
        were finite.
    """
    found: list[Finding] = []
    seen = 0

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal seen
            if found:
                return
            seen += 2
            for leaf, parameter in module.named_parameters(recurse=False):
                if not _is_finite(parameter):
                    part = "weights (and so the scale)" if leaf == "weight" else leaf
                    found.append((seen, f"the {part} of {name}"))
                    return
            value = output[0] if isinstance(output, tuple) and output else output
            if isinstance(value, Tensor) and not _is_finite(value):
                found.append((seen + 1, f"the activations of {name}"))

        return hook

    hooks = [
        module.register_forward_hook(look(name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def gradient_is_finite(model: nn.Module) -> bool:
    """Tells whether a model's whole gradient is finite; every process has to come here.

    Gradients are sharded by FSDP, of some parameters by tensor and expert parallel, or not at all:
    those that are sharded alike have a norm in common.
    """
    held: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            held.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms: list[Any] = [torch.nn.utils.get_total_norm(gradients) for gradients in held.values()]
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in norms]
    return all(bool(torch.isfinite(one)) for one in whole)


def last_non_finite_gradient(model: nn.Module) -> Finding | None:
    """Returns the parameter nearest to the output whose gradient is not finite: the backward pass
    reaches it first.
    """
    found = None
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            found = (-index, f"the gradient of {name}")
    return found


def non_finite_parameter(model: nn.Module) -> Finding | None:
    """Returns the first parameter that holds NaN or infinity, or None."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if not _is_finite(parameter):
            return index, name
    return None


def _is_finite(tensor: Tensor) -> bool:
    """Tells whether a tensor is finite; of a sharded one (DTensor), the part that is here, because
    other processes may not come to the same question.
    """
    if isinstance(tensor, GatheredWeight):
        return tensor.is_finite
    here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(here).all())


def last_checkpoint(directory: str | Path) -> str | None:
    """Returns the newest checkpoint of a run that was written to its end, or None.

    A Trainer writes ``trainer_state.json`` last: without it, or with half of it, the process ended
    while it was saving. Those that were there when the run began are another run's.
    """
    found = [
        (int(number.group(1)), str(folder))
        for folder in Path(directory).glob("checkpoint-*")
        if (number := re.fullmatch(r"checkpoint-(\d+)", folder.name))
        and _is_whole(folder)
        and not is_earlier(folder, directory)
    ]
    return max(found)[1] if found else None


def leave_behind(directory: str | Path) -> None:
    """Notes what states a folder holds in which a run begins: it never goes on from them."""
    run = Path(directory)
    places = [run, *run.glob("checkpoint-*")]
    states = {_key(one, run): _checksum(one) for one in places if (one / _STATE).is_file()}
    if states:
        write_atomically(run / _EARLIER, json.dumps(states, indent=2) + "\n")
    else:
        (run / _EARLIER).unlink(missing_ok=True)


def is_earlier(folder: str | Path, directory: str | Path) -> bool:
    """Tells whether the state in a run's folder, or in a checkpoint of it, is one that the run
    found when it began.

    Args:
        folder: Where the state lies.
        directory: The run's folder.
    """
    try:
        states = dict(json.loads((Path(directory) / _EARLIER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    return bool(states.get(_key(Path(folder), Path(directory))) == _checksum(Path(folder)))


def _key(folder: Path, run: Path) -> str:
    return "." if folder == run else folder.name


def _checksum(folder: Path) -> int:
    return zlib.crc32((folder / _STATE).read_bytes())


def calibration_folder(args: Any) -> Path:
    """Returns where a run keeps, until it has ended, what calibration has found so far."""
    return Path(args.output_dir) / "calibration"


def teacher_folder(args: Any) -> Path:
    """Returns where a run keeps the teacher that it has taught, and the checkpoints of that."""
    return Path(args.output_dir) / "teacher"


def has_begun(args: Any) -> bool:
    """Tells whether there is anything that a run could go on with.

    Args:
        args: The Trainer's.
    """
    begun = calibration_folder(args), teacher_folder(args)
    return last_checkpoint(args.output_dir) is not None or any(one.is_dir() for one in begun)


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def whole_or_nothing(folder: Path, writes: bool) -> Iterator[None]:
    """Removes a checkpoint that could not be written, and puts back the one that it replaced.

    Args:
        folder: The checkpoint that the block writes.
        writes: Whether this process looks after the folder; the others only write into it.

    Raises:
        CheckpointError: Writing failed; earlier checkpoints are as they were.
    """
    previous = folder.with_name(f".{folder.name}.previous")
    if writes and folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    try:
        yield
    except BaseException as error:
        if writes:
            # Out of the way first: what another process writes meanwhile would keep it there.
            given_up = folder.with_name(f".{folder.name}.given_up")
            shutil.rmtree(given_up, ignore_errors=True)
            if folder.exists():
                folder.rename(given_up)
            shutil.rmtree(given_up, ignore_errors=True)
            if previous.exists():
                previous.rename(folder)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            last = last_checkpoint(folder.parent)
            raise CheckpointError(
                f"BitLabTrainer: {folder.name} must be written whole, got {error}\n"
                f"The last good checkpoint is {last or 'none'}; train(resume_from_checkpoint=True) "
                "goes on from it."
            ) from error
        raise
    if writes:
        shutil.rmtree(previous, ignore_errors=True)
