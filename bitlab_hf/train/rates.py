"""Learning rates of their own for the few parameters that steer many: norms, biases, scales."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import DTensor

from bitcore.errors import ArgumentError
from bitlab_hf.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger("bitlab")


def rates_of(model: nn.Module, recipe: Recipe) -> dict[int, float]:
    """Returns by the id of a parameter how many times the run's learning rate it trains with.

    Learned scales have the recipe's ``scale_rate``, what else has one dimension, as norms and
    biases have, its ``vector_rate``. Under a ``rate_magnitude`` all of them are times the mean
    magnitude of the parameter over that one, but for biases, adapters, and what is 0 altogether.
    """
    relative = recipe.rate_magnitude > 0 and getattr(model, "peft_config", None) is None
    rates, elsewhere = {}, 0
    for name, parameter in model.named_parameters():
        rate = 1.0
        if name.endswith("learned_scale"):
            rate = recipe.scale_rate
        elif len(getattr(parameter, "ds_shape", parameter.shape)) == 1:
            rate = recipe.vector_rate
        if relative and not name.endswith("bias") and parameter.requires_grad:
            elsewhere += not parameter.numel()
            rate *= (_mean_magnitude(parameter) or recipe.rate_magnitude) / recipe.rate_magnitude
            # The same in several processes, whose sums round differently.
            rate = float(f"{rate:.4g}")
        rates[id(parameter)] = rate
    if elsewhere:
        logger.warning(
            "bitlab: the magnitudes of %d parameters are not known here, as under DeepSpeed's "
            "ZeRO-3; they learn as if these were %g. Set learning_rate for theirs.",
            elsewhere, recipe.rate_magnitude,
        )  # fmt: skip
    return rates


def check_shards(recipe: Recipe, plugin: Any) -> None:
    """Checks that parameters will be known for what they are when the optimizer is made.

    Args:
        recipe: Whose rates they train with.
        plugin: accelerate's of FSDP; None without.

    Raises:
        ArgumentError: The recipe has rates of its own, and FSDP's first version flattens what they
            are for.
    """
    own = (recipe.scale_rate, recipe.vector_rate) != (1, 1) or recipe.rate_magnitude
    if own and plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
        raise ArgumentError(
            "BitLabTrainer: fsdp must be of version 2 for a recipe with rates of its own, got "
            "version 1, whose flat shards hide which of them is a matrix, a norm or a scale\n"
            'Pass fsdp_config={"version": 2, ...}, or --fsdp_version 2 to accelerate launch.'
        )


def _mean_magnitude(parameter: nn.Parameter) -> float:
    """Returns the mean of a parameter's magnitudes; 0 for one of which this process holds none."""
    if not parameter.numel():
        return 0.0
    mean = parameter.detach().float().abs().mean()
    return float(mean.full_tensor() if isinstance(mean, DTensor) else mean)


class RatesMixin(_Base):
    """Put before a Trainer class with a ``recipe``: gives parameters the recipe's rates.

    The schedule and the weight decay stay the Trainer's; an optimizer that is passed in, or that
    has no learning rate of its own, stays as it is.

    Raises:
        ArgumentError: The recipe has such rates, and the run is one of FSDP's first version.
    """

    recipe: Recipe

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_shards(self.recipe, getattr(self.accelerator.state, "fsdp_plugin", None))

    def create_optimizer(self, model: Any = None) -> Any:
        """Makes the Trainer's optimizer, its groups of parameters split by their rates."""
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        groups = getattr(optimizer, "param_groups", None)
        if given or not groups:
            return optimizer
        rates = rates_of(trained, self.recipe)
        # Rates that hang on the weights are others when a run is resumed, whose optimizer must be
        # split as it was: each parameter on its own.
        each = self.recipe.rate_magnitude > 0
        for group in list(groups):
            if not isinstance(group.get("lr"), (int, float)):
                continue
            split: dict[float, list[Any]] = {}
            for at, parameter in enumerate(group["params"]):
                split.setdefault(at if each else rates[id(parameter)], []).append(parameter)
            group["params"] = [] if each else split.pop(1.0, [])
            for _, parameters in sorted(split.items()):
                rate = group["lr"] * rates[id(parameters[0])]
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        groups[:] = [group for group in groups if group["params"]]
        return optimizer

    def _get_learning_rate(self) -> float:
        """Returns the run's own rate, which the Trainer takes from the first group."""
        rate = float(super()._get_learning_rate())
        first = getattr(self.optimizer, "param_groups", [{}])[0].get("initial_lr")
        return rate * self.args.learning_rate / float(first) if first else rate
