"""The whole life of one architecture, every step judged.

A float model is made and saved; it is loaded latent, trained for a step, saved, loaded again,
deployed, saved, loaded again, and packed while it loads. What a step must hold is said where it is
checked. Nothing here knows an architecture.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore.errors import BitLabError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, quantized_layers
from tests.bitlab_hf.sweep.compare import describe, difference, equal, listed
from tests.bitlab_hf.sweep.configs import small
from tests.bitlab_hf.sweep.floats import left_float
from tests.bitlab_hf.sweep.models import (
    TEXT,
    config_class,
    fit_image_tokens,
    flat,
    inputs_for,
    model_class,
)
from tests.bitlab_hf.sweep.results import Result
from tests.bitlab_hf.sweep.training import fill, heard, multiplied, negate_zeros, train


def _ternary(model: nn.Module) -> list[Found[Any]]:
    return [*quantized_layers(model), *expert_modules(model)]


def _note_call(called: set[str], names: set[str], *_: Any) -> None:
    called.update(names)


class _Stop(Exception):  # noqa: N818
    """Ends a life early: what follows needs what failed."""


def live(architecture: str, folder: Path) -> Result:
    """Takes one architecture through its life; never raises."""
    result = Result(architecture)
    life = _Life(result, folder)
    try:
        life.run()
    except _Stop:
        pass
    except Exception as error:
        result.faults.append(["sweep", describe(error)])
    if result.faults:
        result.outcome = "fault"
    elif result.outcome == "works" and result.left:
        result.outcome = "partly"
    return result


class _Life:
    def __init__(self, result: Result, folder: Path) -> None:
        self.result, self.folder = result, folder
        self.inputs: dict[str, Any] = {}
        self.said: list[str] = []

    def run(self) -> None:
        self._float()
        latent = self._latent()
        eval_outputs = self._eval(latent)
        names = sorted(found.names[0] for found in _ternary(latent))
        with self._step("hidden weights"):
            self._only_ternary(latent, train=False)
        if self.stock_trains is None:
            self.result.notes.append("not trained: the float model does not train on these inputs")
        with self._step("training"):
            self._training(copy.deepcopy(latent), eval_outputs)
        with self._step("latent file"):
            save(latent, self.folder / "latent")
            again = self._load("latent")
            self._same("latent reloaded", self._outputs(again), eval_outputs, 1e-5)
            self._same_layers("latent reloaded", again, names)
        with self._step("deploy", fatal=True):
            deploy(latent)
            deployed = self._outputs(latent)
            self._same("deployed", deployed, eval_outputs, 1e-4)
        with self._step("packed file", fatal=True):
            save(latent, self.folder / "packed")
        with self._step("packed file"):
            again = self._load("packed", mapped=True)
            self._same("packed reloaded", self._outputs(copy.deepcopy(again)), deployed, 0.0)
            in_place = 1e-5 if self.stock_depends_on_place else 0.0
            self._same("packed, as it lies in the file", self._outputs(again), deployed, in_place)
            self._same_layers("packed reloaded", again, names)
        for source in ("float", "latent"):
            with self._step(f"infer from {source}"):
                packed = self._load(source, quantization_config=BitLabConfig(mode="infer"))
                self._same(f"infer from {source}", self._outputs(packed), deployed, 1e-4)
                self._same_layers(f"infer from {source}", packed, names)

    # Steps.

    def _float(self) -> None:
        """A float model, by transformers alone: what fails here is no fault of BitLab."""
        try:
            self.cls = model_class(self.result.architecture)
            self.result.model = self.cls.__name__
            config = small(config_class(self.result.architecture))
            torch.manual_seed(0)
            model = self.cls(config).eval()
            fill(model)
            self._find_inputs(model)
            model.save_pretrained(self.folder / "float")
            stock, info = self.cls.from_pretrained(self.folder / "float", output_loading_info=True)
            self.missing = set(info["missing_keys"])
            self.unexpected = set(info["unexpected_keys"])
            stock.eval()
            before = self._outputs(stock)
            if not before or not all(bool(torch.isfinite(t).all()) for t in before):
                raise ValueError("the float model's outputs are not finite")
            if not equal(before, self._outputs(stock), 0.0):
                raise ValueError("the float model's outputs differ from call to call")
        except Exception as error:
            self._not_swept(describe(error))
        if not equal(before, self._outputs(model), 1e-5):
            self.result.notes.append("transformers' own float model changes by a reload")
        self.stock_depends_on_place = not equal(before, self._outputs(copy.deepcopy(stock)), 0.0)
        self.stock_trains, self.stock_gradients = train(stock, self.inputs, before)
        self.had_gradient = self.stock_gradients

    def _find_inputs(self, model: PreTrainedModel) -> None:
        """Finds inputs that the model takes: with its images and sounds, else its text alone."""
        given = inputs_for(model)
        text = {name: value for name, value in given.items() if name in TEXT}
        first: Exception | None = None
        for inputs in (given, text if text != given and "input_ids" in text else None):
            for _ in range(4):
                if inputs is None:
                    break
                self.inputs = inputs
                try:
                    self._outputs(model)
                except Exception as error:
                    if "pixel_values" in inputs or first is None:
                        first = error
                    inputs = fit_image_tokens(model, inputs, str(error))
                else:
                    if first is not None and "pixel_values" not in inputs:
                        self.result.notes.append("given text alone")
                    return
        assert first is not None
        raise first

    def _latent(self) -> PreTrainedModel:
        with heard(self.said), self._step("latent", fatal=True):
            latent = self._load("float", quantization_config=BitLabConfig())
        layers = quantized_layers(latent)
        weights = {id(found.module.weight): found.module.weight.numel() for found in layers}
        for one in expert_modules(latent):
            weights[id(one.module)] = sum(stack.weights for stack in one.module.stacks.values())
        self.result.converted = len(_ternary(latent))
        self.result.share = sum(weights.values()) / sum(p.numel() for p in latent.parameters())
        left, unexplained = left_float(latent, self.said)
        self.result.left = left
        for name in unexplained:
            self.result.faults.append(["left float", f"{name} stays float and nothing says so"])
        return latent

    def _eval(self, latent: PreTrainedModel) -> list[Tensor]:
        outputs: list[Tensor] = []
        with self._step("eval", fatal=True):
            outputs = self._outputs(latent)
            if not all(bool(torch.isfinite(t).all()) for t in outputs):
                self._fault("eval", "outputs are not finite")
        return outputs

    def _only_ternary(self, model: PreTrainedModel, train: bool) -> None:
        """What the ternary form of a weight does not show must not show in the outputs.

        A weight whose code is zero may be negated: neither a code nor the mean of the absolute
        values changes by a bit.
        """
        hidden = copy.deepcopy(model)
        before = self._outputs(hidden)
        layers = _ternary(hidden)
        undo = negate_zeros([found.module for found in layers])
        after = self._outputs(hidden)
        if equal(after, before, 0.0):
            return
        undo()
        readers = []
        for found in layers:
            undo = negate_zeros([found.module])
            if not equal(self._outputs(hidden), before, 0.0):
                readers.append(found.names[0])
            undo()
        self._fault(
            "hidden weights",
            f"{'train' if train else 'eval'} mode reads float weights of {listed(readers)} "
            f"(outputs change by {difference(after, before)})",
        )

    def _training(self, latent: PreTrainedModel, eval_outputs: list[Tensor]) -> None:
        if self.stock_trains is None:
            return
        called: set[str] = set()
        # A layer is used where one is called that holds the same weight.
        holders: dict[int, set[str]] = {}
        handles = []
        for found in _ternary(latent):
            names = holders.setdefault(id(multiplied(found.module)[0]), set())
            names.add(found.names[0])
            hook = partial(_note_call, called, names)
            handles.append(found.module.register_forward_hook(hook))
        latent.train()
        if self.stock_trains:
            with torch.no_grad():
                outputs = self._outputs(latent)
            self._same("train mode against eval mode", outputs, eval_outputs, 1e-5)
            self._only_ternary(latent, train=True)
        called.clear()
        _, gradients = train(latent, self.inputs, None)
        for handle in handles:
            handle.remove()
        without = sorted((called & self.had_gradient) - gradients)
        if without:
            self._fault("training", f"no gradient reaches {listed(without)}")
        silent = sorted(
            found.names[0]
            for found in _ternary(latent)
            if found.names[0] not in called and found.names[0] in self.had_gradient
        )
        # A router may choose other experts; what no forward of ours ever calls is something else.
        silent = [name for name in silent if "expert" not in name]
        if silent:
            self._fault("training", f"the float model uses {listed(silent)}, which is not called")

    # Helpers.

    def _load(self, source: str, mapped: bool = False, **kwargs: Any) -> PreTrainedModel:
        """Loads a model; unless it is to stay as mapped, in memory of its own.

        Where a tensor lies in a file may change the last bits of a float product, and of what is
        rounded after it.
        """
        model, info = self.cls.from_pretrained(
            self.folder / source, output_loading_info=True, **kwargs
        )
        for kind, usual in (("missing_keys", self.missing), ("unexpected_keys", self.unexpected)):
            keys_found = sorted(set(info[kind]) - usual)
            if keys_found:
                self._fault(source, f"{kind.replace('_', ' ')}: {listed(keys_found)}")
        if info["mismatched_keys"]:
            self._fault(source, f"mismatched keys: {listed(map(str, info['mismatched_keys']))}")
        loaded: PreTrainedModel = model.eval()
        return loaded if mapped else copy.deepcopy(loaded)

    def _outputs(self, model: PreTrainedModel) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return flat(model(**copy.deepcopy(self.inputs)))

    def _same(self, step: str, got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
        if not equal(got, want, tolerance):
            self._fault(step, f"outputs differ by {difference(got, want)}")
        elif not equal(got, want, 0.0):
            self.result.notes.append(f"{step}: outputs differ by {difference(got, want)}")

    def _same_layers(self, step: str, model: PreTrainedModel, names: list[str]) -> None:
        got = sorted(found.names[0] for found in _ternary(model))
        if got != names:
            self._fault(step, f"other layers are ternary: {listed(set(got) ^ set(names))}")

    def _fault(self, step: str, what: str) -> None:
        self.result.faults.append([step, what])

    def _not_swept(self, reason: str) -> None:
        self.result.outcome, self.result.reason = "not swept", reason
        raise _Stop

    @contextlib.contextmanager
    def _step(self, name: str, fatal: bool = False) -> Iterator[None]:
        try:
            yield
        except BitLabError as error:
            if name == "latent":
                self.result.outcome, self.result.reason = "refused", str(error).splitlines()[0]
            else:
                # Refused only after it was accepted: said clearly, but too late to be an answer.
                self._fault(name, f"refused: {str(error).splitlines()[0]}")
            if fatal:
                raise _Stop from error
        except _Stop:
            raise
        except Exception as error:
            self._fault(name, describe(error))
            if fatal:
                raise _Stop from error
