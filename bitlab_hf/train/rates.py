"""Learning rates of their own for the few parameters that steer many: norms, biases, scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor

from bitlab_hf.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


def rates_of(model: nn.Module, recipe: Recipe) -> dict[int, float]:
    """Returns by the id of a parameter how many times the run's learning rate it trains with.

    Learned scales have the recipe's ``scale_rate``, what else has one dimension, as norms and
    biases have, its ``vector_rate``. Under a ``rate_magnitude`` all of them are times the mean
    magnitude of the parameter over that one, but for biases, adapters, and what is 0 altogether.
    """
    relative = recipe.rate_magnitude > 0 and getattr(model, "peft_config", None) is None
    rates = {}
    for name, parameter in model.named_parameters():
        rate = 1.0
        if name.endswith("learned_scale"):
            rate = recipe.scale_rate
        elif parameter.dim() == 1:
            rate = recipe.vector_rate
        if relative and not name.endswith("bias") and parameter.requires_grad:
            rate *= (_mean_magnitude(parameter) or recipe.rate_magnitude) / recipe.rate_magnitude
            # The same in several processes, whose sums round differently.
            rate = float(f"{rate:.4g}")
        rates[id(parameter)] = rate
    return rates


def _mean_magnitude(parameter: nn.Parameter) -> float:
    """Returns the mean of a parameter's magnitudes; 0 for one of which this process holds none."""
    if not parameter.numel():
        return 0.0
    mean = parameter.detach().float().abs().mean()
    return float(mean.full_tensor() if isinstance(mean, DTensor) else mean)


def _split(
    parameters: list[Any], rates: dict[int, float], each: bool
) -> list[tuple[float, list[Any]]]:
    """Returns parameters with the rate that they have in common, or each on its own.

    Rates that hang on the weights are others when a run is resumed, whose optimizer must be split
    as it was.
    """
    if each:
        return [(rates[id(parameter)], [parameter]) for parameter in parameters]
    split: dict[float, list[Any]] = {}
    for parameter in parameters:
        split.setdefault(rates[id(parameter)], []).append(parameter)
    return sorted(split.items())


class RatesMixin(_Base):
    """Put before a Trainer class with a ``recipe``: gives parameters the recipe's rates.

    The schedule and the weight decay stay the Trainer's; an optimizer that is passed in, or that
    has no learning rate of its own, stays as it is.
    """

    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the Trainer's optimizer, its groups of parameters split by their rates.

        The first group's rate is what the Trainer logs: the run's own, if the group is empty.
        """
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        groups = getattr(optimizer, "param_groups", None)
        if given or not groups:
            return optimizer
        rates = rates_of(trained, self.recipe)
        if set(rates.values()) == {1.0}:
            return optimizer
        for group in list(groups):
            if not isinstance(group.get("lr"), (int, float)):
                continue
            parameters, group["params"] = group["params"], []
            for rate, same in _split(parameters, rates, each=self.recipe.rate_magnitude > 0):
                optimizer.add_param_group({**group, "params": same, "lr": group["lr"] * rate})
        groups[:] = [group for at, group in enumerate(groups) if at == 0 or group["params"]]
        return optimizer
