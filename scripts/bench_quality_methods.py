"""The methods that the quality benchmark compares: a float model in, a trained one out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bitlab_hf import BitLabConfig

# Steps that are not timed: torch.compile and first allocations fall into them.
UNTIMED_STEPS = 8


@dataclass(frozen=True)
class Method:
    """One way to train a ternary model, or the float one.

    Attributes:
        title: What tables say.
        linear: "float", "auto" (transformers' online `AutoBitLinear`) or "bitlab".
        granularity: Of BitLab's weight scales.
        distill: Weight of the distillation term; 0: the labels' loss alone.
        temperature: Of the distillation.
        labels: Weight of the labels' loss beside distillation.
        hidden: Weight of the squared distance of the last hidden states.
    """

    title: str
    linear: str = "bitlab"
    granularity: str = "per_tensor"
    distill: float = 0.0
    temperature: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0


METHODS = {
    "float": Method("full precision, fine-tuned", linear="float"),
    "auto": Method("AutoBitLinear online, Trainer", linear="auto"),
    "plain": Method("BitLab, Trainer"),
    "channel": Method("BitLab per channel, Trainer", granularity="per_channel"),
    "kl": Method("distillation, T = 1", distill=1.0),
    "kl2": Method("distillation, T = 2", distill=1.0, temperature=2.0),
    "kl-labels": Method("distillation + labels, half each", distill=0.5, labels=0.5),
    "kl-hidden": Method("distillation + last hidden states", distill=1.0, hidden=1.0),
    "kl-channel": Method("distillation, per channel", distill=1.0, granularity="per_channel"),
}
TRAINED = tuple(METHODS)


def load_float(folder: Path) -> Any:
    """Loads the pretrained model in full precision."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_bitlab(folder: Path, granularity: str, mode: str = "train") -> Any:
    """Loads it ternary: latent to train, or rounded (``mode="infer"``)."""
    config = BitLabConfig(weight_granularity=granularity, mode=mode)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


def load_method(method: Method, folder: Path) -> Any:
    """Builds the model that a method trains."""
    if method.linear == "bitlab":
        return load_bitlab(folder, method.granularity)
    model = load_float(folder)
    return auto_bitlinear(model) if method.linear == "auto" else model


def auto_bitlinear(model: Any) -> Any:
    """Puts transformers' online `AutoBitLinear` in the place of each linear layer but the head."""
    from transformers.integrations.bitnet import AutoBitLinear

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = AutoBitLinear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                dtype=module.weight.dtype,
                online_quant=True,
            )
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new)
    return model


class DistillingTrainer(Trainer):
    """A Trainer whose model learns the float model's distribution of the next token."""

    def __init__(self, *args: Any, teacher: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher.eval().requires_grad_(False)
        self._method = method
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """``T^2 KL(teacher || model)`` at temperature T, and the method's other terms."""
        method, hidden = self._method, self._method.hidden > 0
        ids = inputs["input_ids"]
        with torch.no_grad():
            target = self._teacher(input_ids=ids, output_hidden_states=hidden)
        output = model(input_ids=ids, output_hidden_states=hidden)
        t = method.temperature
        wanted = (target.logits / t).log_softmax(-1)
        found = (output.logits / t).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none")
        loss = method.distill * t**2 * divergence.sum(-1).mean()
        if method.labels:
            shifted = output.logits[:, :-1].flatten(0, 1)
            labels = torch.nn.functional.cross_entropy(shifted, ids[:, 1:].flatten())
            loss = loss + method.labels * labels
        if hidden:
            last = target.hidden_states[-1]
            distance = (output.hidden_states[-1] - last).square().mean()
            loss = loss + method.hidden * distance / last.square().mean()
        return (loss, output) if return_outputs else loss


class _Clock(TrainerCallback):
    """CPU seconds of the process, from the first timed step on."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if state.global_step <= UNTIMED_STEPS:
            self._started = now
        else:
            self.seconds, self.steps = now - self._started, state.global_step - UNTIMED_STEPS


def train(
    method: Method, folder: Path, blocks: Tensor, rate: float, seed: int, batch: int, scratch: str
) -> tuple[Any, float]:
    """Trains a method's model on each block once.

    Returns:
        The model, and CPU seconds a token.
    """
    torch.manual_seed(seed)
    model = load_method(method, folder)
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,
        weight_decay=0.0,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": [{"input_ids": ids, "labels": ids} for ids in blocks],
        "callbacks": [clock],
    }
    make: Callable[..., Trainer] = Trainer
    if method.distill:
        make = DistillingTrainer
        common |= {"teacher": load_float(folder), "method": method}
    make(**common).train()
    return model, clock.seconds / max(1, clock.steps * batch * blocks.shape[1])
