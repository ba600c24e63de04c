"""Learning rates of their own for the few parameters that steer many: norms, biases, scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from bitlab_hf.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


def rates_of(model: nn.Module, recipe: Recipe) -> dict[int, float]:
    """Returns by the id of a parameter how many times the run's learning rate it trains with.

    Learned scales have the recipe's ``scale_rate``, what else has one dimension, as norms and
    biases have, its ``vector_rate``; all others are left out.
    """
    rates = {}
    for name, parameter in model.named_parameters():
        if name.endswith("learned_scale"):
            rates[id(parameter)] = recipe.scale_rate
        elif parameter.dim() == 1:
            rates[id(parameter)] = recipe.vector_rate
    return {key: rate for key, rate in rates.items() if rate != 1}


class RatesMixin(_Base):
    """Put before a Trainer class with a ``recipe``: gives parameters the recipe's rates.

    The schedule and the weight decay stay the Trainer's; an optimizer that is passed in, or that
    has no learning rate of its own, stays as it is.
    """

    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the Trainer's optimizer, its groups of parameters split by their rates."""
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        rates = rates_of(trained, self.recipe)
        groups = getattr(optimizer, "param_groups", None)
        if given or not rates or not groups:
            return optimizer
        for group in list(groups):
            if not isinstance(group.get("lr"), (int, float)):
                continue
            split: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                split.setdefault(rates.get(id(parameter), 1.0), []).append(parameter)
            group["params"] = split.pop(1.0, [])
            for rate, parameters in sorted(split.items()):
                optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * rate})
        # The first one's rate is what the Trainer logs.
        groups[:] = [group for group in groups if group["params"]]
        return optimizer
