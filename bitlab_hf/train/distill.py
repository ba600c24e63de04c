"""Distillation for any Trainer: a mixin that adds a teacher's terms to the loss."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitcore.errors import ArgumentError
from bitlab_hf.train.logits import StoredLogits, check_stored, is_stored
from bitlab_hf.train.losses import (
    balancing_weight,
    hidden_difference,
    logits_divergence,
    relation_divergence,
    top_divergence,
)
from bitlab_hf.train.recipe import Recipe, get_recipe
from bitlab_hf.train.teacher import (
    States,
    ask,
    check_causal,
    check_vocabulary,
    load_teacher,
    logits_of,
    watch,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class DistillationMixin(_Base):
    """Put before a Trainer class, gives it ``recipe=`` and ``teacher=``.

    In training, the loss is the Trainer's own (with its label smoothing, if any) times
    ``cross_entropy_weight``, plus the recipe's terms; without the Trainer's own, a mixture that
    returns a loss of its routers (``output_router_logits``) adds it with its configuration's
    weight. Evaluation is the Trainer's. Positions whose
    label is -100 do not count, and every term is normalized over the whole optimizer step, as the
    Trainer normalizes its own.

    Args:
        recipe: A `Recipe` or the name of one.
        teacher: A model, its path, or a folder of `precompute_logits`; kept out of checkpoints and
            of data-parallel wrappers.
        args, kwargs: The Trainer's.

    Raises:
        ArgumentError: The recipe needs a teacher and there is none, the teacher does not fit, or
            the model to be distilled is no causal language model.
    """

    def __init__(
        self, *args: Any, recipe: str | Recipe = "default", teacher: Any = None, **kwargs: Any
    ) -> None:
        self.recipe = get_recipe(recipe)
        if teacher is None and self.recipe.teacher_required:
            raise ArgumentError(
                "BitLabTrainer: teacher must be given for this recipe, got None\n"
                "Pass the original model or its path, or recipe='plain'."
            )
        super().__init__(*args, **kwargs)
        self._teacher: Any = None
        self._terms: dict[str, list[Tensor]] = {}
        self._noted_from = 0
        self._stored: StoredLogits | None = None
        if teacher is not None and self.recipe.distills:
            check_causal("BitLabTrainer", "model", self._inner())
        if is_stored(teacher) and self.recipe.distills:
            self._stored = StoredLogits(teacher)
            check_stored(self._stored.settings, self._inner(), self.recipe)
        elif teacher is not None and self.recipe.distills:
            tokenizer: Any = self.processing_class
            if isinstance(teacher, str | os.PathLike) and hasattr(tokenizer, "get_vocab"):
                check_vocabulary("BitLabTrainer", "teacher", teacher, tokenizer)
            device = self.args.device
            self._teacher = load_teacher(teacher, self._inner(), self.recipe, device.type)
            if not getattr(self._teacher, "is_quantized", False):
                self._teacher.to(device)

    def _inner(self) -> Any:
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss of a batch, as the Trainer asks for it."""
        if (self._teacher is None and self._stored is None) or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        recipe, inner, given = self.recipe, self._inner(), dict(inputs)
        with watch(model, inner, recipe) as states:
            balancing = None
            if recipe.cross_entropy_weight:
                result: Any = super().compute_loss(
                    model, inputs, return_outputs, num_items_in_batch
                )
                loss, outputs = result if return_outputs else (result, None)
                self._note("loss_ce", loss, num_items_in_batch)
                loss = recipe.cross_entropy_weight * loss
            else:
                outputs = model(**{key: v for key, v in given.items() if key != "labels"})
                loss, balancing = 0.0, getattr(outputs, "aux_loss", None)
        target = None
        if self._stored is None:
            with self.accelerator.autocast():
                target = ask(self._teacher, given, recipe)
        loss = loss + self._distillation(
            states, target, inner, given, balancing, num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss

    def _distillation(
        self,
        states: States,
        target: States | None,
        inner: Any,
        inputs: dict[str, Any],
        balancing: Tensor | None,
        items: Any,
    ) -> Tensor:
        recipe = self.recipe
        tokens = self._tokens(inputs)
        student = logits_of(states, inner)
        labelled = self._labelled(inputs, tokens)
        count = labelled.sum()
        # Each term is a mean here; over an optimizer step, batches weigh as their labels do.
        share: Any = 1.0 if items is None else count / items
        if items is not None and self.args.average_tokens_across_devices:
            share = share * (
                self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu
            )
        total: Tensor = torch.zeros((), device=student.device)
        terms: dict[str, tuple[float, Tensor]] = {}
        if recipe.logits_weight:
            if target is None:
                term = self._stored_divergence(student, inputs["input_ids"], tokens, labelled)
            else:
                rows = student[labelled], logits_of(target, self._teacher)[labelled]
                term = logits_divergence(*rows, recipe.temperature)
            terms["loss_logits"] = (recipe.logits_weight, term)
        if recipe.hidden_weight and target is not None:
            differences = [
                hidden_difference(ours[labelled], theirs[labelled])
                for ours, theirs in zip(states.hidden, target.hidden, strict=True)
            ]
            terms["loss_hidden"] = (recipe.hidden_weight, torch.stack(differences).mean())
        if recipe.relation_weight and target is not None:
            divergences = [
                relation_divergence(ours, theirs, tokens, recipe.relation_heads)
                for ours, theirs in zip(states.relations, target.relations, strict=True)
            ]
            terms["loss_relation"] = (recipe.relation_weight, torch.stack(divergences).sum())
        if balancing is not None:
            terms["loss_balancing"] = (balancing_weight(inner.config), balancing)
        for name, (weight, term) in terms.items():
            self._note(name, term * share, items)
            total = total + weight * share * term
        return total

    def _stored_divergence(
        self, student: Tensor, ids: Tensor, tokens: Tensor, labelled: Tensor
    ) -> Tensor:
        assert self._stored is not None
        top = self._stored.read(ids, tokens, labelled)
        temperature = self.recipe.temperature
        return top_divergence(
            student[labelled], top.indices, top.probabilities, top.rest, temperature
        )

    def _tokens(self, inputs: dict[str, Any]) -> Tensor:
        mask: Tensor | None = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            return mask.bool()
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)

    def _labelled(self, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
        """Returns which positions predict a label: bool [B, L]."""
        if "shift_labels" in inputs:
            return torch.as_tensor((inputs["shift_labels"] != -100) & tokens)
        labels = inputs.get("labels")
        valid = tokens if labels is None else labels != -100
        if not self._loss_shifts_labels:
            return torch.as_tensor(valid & tokens)
        # Position t predicts token t + 1; the last one predicts nothing that is known.
        shifted = torch.zeros_like(valid)
        shifted[:, :-1] = valid[:, 1:]
        # What padding predicts means nothing, on either side.
        return shifted & tokens

    def _note(self, name: str, value: Tensor, items: Any) -> None:
        # A batch's part of its optimizer step: the Trainer divides what was not counted by items.
        if not self._terms:
            self._noted_from = self.state.global_step
        parts = 1 if items is not None else self.current_gradient_accumulation_steps
        self._terms.setdefault(name, []).append(value.detach() / parts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each term's mean over the optimizer steps since the last log to a training log, as
        this process saw them.
        """
        if "loss" in logs and self._terms:
            steps = max(1, self.state.global_step - self._noted_from)
            for name, values in self._terms.items():
                logs[name] = torch.stack(values).float().sum().item() / steps
            self._terms = {}
        super().log(logs, *args, **kwargs)
