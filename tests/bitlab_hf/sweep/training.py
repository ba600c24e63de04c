"""What is done to a model beside a forward: other values, a backward pass, hidden changes."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitlab_hf.model.experts import projections
from bitlayers.experts import BitExperts
from tests.bitlab_hf.sweep.compare import equal
from tests.bitlab_hf.sweep.models import flat


def fill(model: PreTrainedModel) -> None:
    """Gives every bias and norm weight values of its own, so that a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() >= 2 and (parameter == 0).all():
                parameter.copy_(0.02 * noise)


def train(
    model: PreTrainedModel, inputs: dict[str, Any], eval_outputs: list[Tensor] | None
) -> tuple[bool | None, set[str]]:
    """Takes a model backward in training mode.

    Returns:
        Whether training mode computes the outputs of eval mode, None where it raises, and the names
        of the modules whose weight has a gradient.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    try:
        output = model(**copy.deepcopy(inputs))
    except Exception:
        if eval_outputs is None:
            raise
        # The float model itself needs more than its inputs to train.
        return None, set()
    loss = sum(t.float().pow(2).mean() for t in _with_gradient(output))
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    gradients = {
        name
        for name, module in model.named_modules()
        if (weights := multiplied(module)) and all(weight.grad is not None for weight in weights)
    }
    # What a norm of the batch computes in training is close to eval mode only by chance.
    batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    same = not batch and eval_outputs is not None and equal(flat(output), eval_outputs, 1e-5)
    model.zero_grad(set_to_none=True)
    return same, gradients


def _with_gradient(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in _with_gradient(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _with_gradient(value)]
    return []


def multiplied(module: nn.Module) -> list[Tensor]:
    """Returns the weights of a linear layer, or of experts that are kept as tensors."""
    if isinstance(module, nn.Linear):
        return [] if module.weight is None else [module.weight]
    names = module.stacks if isinstance(module, BitExperts) else projections(module)
    held = (module._parameters.get(name) for name in names)
    return [one for one in held if one is not None]


def negate_zeros(layers: list[Any]) -> Callable[[], None]:
    """Negates the weights whose code is zero, of layers and of experts; returns what undoes it."""
    held = []
    with torch.no_grad():
        for layer in layers:
            for name in layer.stacks if isinstance(layer, BitExperts) else ():
                weight = layer._parameters[name]
                assert weight is not None
                held.append((weight, weight.detach().clone()))
                codes = layer.dequantized(name)
                weight.copy_(torch.where(codes == 0, -weight, weight))
                assert torch.equal(layer.dequantized(name), codes)
            if isinstance(layer, BitExperts):
                continue
            weight = layer.weight
            held.append((weight, weight.detach().clone()))
            was_training = layer.training
            layer.eval()
            codes = layer.dequantized_weight()
            weight.copy_(torch.where(codes == 0, -weight, weight))
            assert torch.equal(layer.dequantized_weight(), codes)
            layer.train(was_training)

    def undo() -> None:
        with torch.no_grad():
            for weight, before in held:
                weight.copy_(before)

    return undo


@contextlib.contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """Collects what BitLab says."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler(logging.INFO)
    logger = logging.getLogger("bitlab")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
