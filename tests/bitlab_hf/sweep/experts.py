"""Every class of transformers that keeps experts as tensors: where they are, what becomes of each,
and the table that says so.
"""

from __future__ import annotations

import ast
import copy
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitlab_hf import BitLabConfig, deploy, quantized_layers, save
from bitlab_hf.model import expert_forms as forms
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import find_modules
from bitlayers.experts import BitExperts
from tests.bitlab_hf.sweep.configs import FIRST_TOKEN, small
from tests.bitlab_hf.sweep.models import architectures, class_name, config_class, model_class
from tests.bitlab_hf.sweep.training import fill

TABLE = Path(__file__).parents[3] / "docs" / "experts.md"
COMMAND = "python scripts/sweep.py --experts --write docs/experts.md"
MODELS = Path(transformers.__file__).parent / "models"
# Built by no architecture alone: a talker that another model makes.
NOT_BUILT = {"Qwen3OmniMoeTalkerTextExperts"}
ROUTERS = re.compile(r"router|(^|\.)gate(\.|$)|gate\.wg$|gating|shared_expert_gate")


@cache
def classes() -> dict[str, list[str]]:
    """Returns the classes by the folder of transformers that has them: those that make a Parameter
    of several sizes, the first of which counts experts.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text()
        # Most have none, and to parse a file takes long.
        for node in ast.parse(text).body if "expert" in text else ():
            if isinstance(node, ast.ClassDef) and any(map(_is_stack, ast.walk(node))):
                found.setdefault(file.parent.name, []).append(node.name)
    return found


def _is_stack(node: ast.AST) -> bool:
    """Tells whether an expression makes a Parameter that holds a matrix for each expert."""
    if not isinstance(node, ast.Call) or getattr(node.func, "attr", None) != "Parameter":
        return False
    made = node.args[0] if node.args else None
    if not isinstance(made, ast.Call) or not made.args:
        return False
    inner = made.args[0]
    sizes = inner.elts if isinstance(inner, ast.Tuple) else made.args
    first = ast.unparse(sizes[0]).lower()
    return "expert" in first and (len(sizes) > 2 or "*" in first)


def folder_of(architecture: str) -> str:
    """Returns the folder of transformers that has an architecture's class."""
    return Path(model_class(architecture).__module__.replace(".", "/")).parent.name


@cache
def with_experts() -> list[str]:
    """Returns the architectures whose models are of such a folder."""
    # No inputs are known for the second, which is no matter here.
    names = [*architectures(), "deepseek_ocr2"]
    return [name for name in names if class_name(name) and folder_of(name) in classes()]


def build(architecture: str) -> Any:
    """Returns a small float model with values of its own everywhere."""
    torch.manual_seed(0)
    model = model_class(architecture)(small(config_class(architecture))).eval()
    fill(model)
    return model


def inputs_of(module: BitExperts) -> tuple[Any, ...]:
    """Returns what the forward of an experts module can be given; its last expert gets nothing,
    where the caller chooses.
    """
    generator = torch.Generator().manual_seed(4)
    width, experts = next(iter(module.stacks.values())).in_features, module.num_experts
    x = torch.randn(11, width, generator=generator)
    index = torch.randint(0, experts - 1, (11, 2), generator=generator) if experts > 1 else None
    weights = torch.rand(11, 2, generator=generator)
    if isinstance(module, forms.SharedExperts):
        return x, torch.rand(11, experts, generator=generator)
    if isinstance(module, forms.ExpertsOfSortedTokens):
        return x, [4, 7, *[0] * (experts - 2)]
    if isinstance(module, forms.ExpertsOfEveryToken):
        chosen = nn.functional.one_hot(index[:, 0], experts).T.reshape(-1, 1)  # type: ignore[index]
        return (x.repeat(experts, 1) * chosen,)
    if isinstance(module, forms.ExpertsWithIdentities):
        index[:4, 1] = experts  # type: ignore[index]
    return x, index, weights


def used_experts(module: BitExperts, inputs: tuple[Any, ...]) -> list[bool]:
    """Returns which experts these inputs reach."""
    index = module.routed(*inputs)[1]
    return [expert in index for expert in range(module.num_experts)]


def call(module: Any, inputs: tuple[Any, ...]) -> Tensor:
    """Returns what a module makes of these, without gradients."""
    with torch.no_grad():
        return module(*inputs)  # type: ignore[no-any-return]


@dataclass
class Row:
    """What became of the experts of a class in one architecture.

    Attributes:
        kind: The class.
        architecture: Where it was looked at.
        share: Of the model's linear weights but routers and the output head, how much is ternary.
        left: What else stays float, a name with stars for numbers, and its share.
        equal: Whether training, evaluation and the deployed module give the same bits.
        reload: Whether the deployed and the packed-at-load model give them in another process's
            place: loaded from their files.
        generate: Whether the reloaded model generates what the deployed one does; None of one that
            generates nothing.
    """

    kind: str
    architecture: str
    share: float = 0.0
    left: dict[str, float] = field(default_factory=dict)
    equal: bool = False
    reload: bool = False
    generate: bool | None = None

    def holds(self) -> bool:
        """Tells whether all is as it is to be: nothing of the experts stays float, or differs."""
        experts_left = any("expert" in name for name in self.left)
        return self.equal and self.reload and self.generate is not False and not experts_left

    def line(self) -> str:
        """Returns the line of the table."""
        marks = {True: "yes", False: "**no**", None: ""}
        left = "; ".join(f"`{name}` {100 * share:.1f} %" for name, share in self.left.items())
        # Not rounded up to what it is not.
        share = f"{int(1000 * self.share) / 10:g} %"
        cells = [f"`{self.kind}`", self.architecture, share, left]
        cells += [marks[one] for one in (self.equal, self.reload, self.generate)]
        return f"| {' | '.join(cells)} |"


def looked_at(architecture: str, folder: Path) -> list[Row]:
    """Takes an architecture's experts through their life; one row a class."""
    model = build(architecture)
    kinds = set(classes()[folder_of(architecture)])
    names = {n: type(m).__name__ for n, m in model.named_modules() if type(m).__name__ in kinds}
    rows = {kind: Row(kind, architecture) for kind in sorted(set(names.values()))}
    model.save_pretrained(folder / "float")
    load = type(model).from_pretrained
    latent = load(folder / "float", quantization_config=BitLabConfig())
    share, left = shares(latent)
    found = {one.names[0]: one.module for one in expert_modules(latent)}
    inputs, outputs = {}, {}
    equal = dict.fromkeys(rows, True)
    for name, module in found.items():
        inputs[name] = inputs_of(module)
        trained, evaluated = (call(module.train(mode), inputs[name]) for mode in (True, False))
        deployed = call(copy.deepcopy(module).deploy(), inputs[name])
        equal[names[name]] &= torch.equal(trained, evaluated) and torch.equal(evaluated, deployed)
        outputs[name] = evaluated
    save(deploy(latent.eval()), folder / "packed")
    at_load = load(folder / "float", quantization_config=BitLabConfig(mode="infer"))
    again = load(folder / "packed")
    reload = dict.fromkeys(rows, True)
    for loaded in (again, at_load):
        modules = {one.names[0]: one.module for one in expert_modules(loaded)}
        for name, output in outputs.items():
            same = modules[name].is_deployed and torch.equal(
                call(modules[name], inputs[name]), output
            )
            reload[names[name]] &= same
    generate = _generates(model, latent, again)
    missing = {names[name] for name in names.keys() - _all_names(expert_modules(latent))}
    for kind, row in rows.items():
        row.share, row.left, row.generate = share, left, generate
        row.equal = equal[kind] and kind not in missing
        row.reload = reload[kind] and kind not in missing
    return list(rows.values())


def _all_names(found: Iterable[Any]) -> set[str]:
    return {name for one in found for name in one.names}


def shares(latent: Any) -> tuple[float, dict[str, float]]:
    """Returns how much of a latent model's linear weights but routers and the output head is
    ternary, and what is not, by name with its share.
    """
    ternary = {id(one.module.weight): one.module.weight.numel() for one in quantized_layers(latent)}
    for one in expert_modules(latent):
        for name, stack in one.module.stacks.items():
            ternary[id(one.module._parameters[name])] = stack.weights
    head, kinds = latent.get_output_embeddings(), set(chain.from_iterable(classes().values()))
    floats: dict[int, tuple[str, int]] = {}
    for found in find_modules(latent, nn.Module):
        module, name = found.module, found.names[0]
        linear = isinstance(module, nn.Linear | Conv1D)
        stacked = type(module).__name__ in kinds
        if (not linear and not stacked) or module is head or ROUTERS.search(name):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in ternary:
                floats[id(parameter)] = f"{name}.{leaf}", parameter.numel()
    total = sum(ternary.values()) + sum(size for _, size in floats.values())
    left: dict[str, float] = {}
    for name, size in floats.values():
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        left[kind] = left.get(kind, 0.0) + size / total
    return sum(ternary.values()) / total, left


def _generates(stock: Any, deployed: Any, again: Any) -> bool | None:
    """Tells whether two models generate the same from a prompt; None where the float model does not
    generate from one.
    """
    try:
        _generated(stock)
    except Exception:
        # It needs more than a prompt.
        return None
    first, second = _generated(deployed), _generated(again)
    return first.shape[1] > 1 and torch.equal(first, second)


def _generated(model: Any) -> Tensor:
    if not model.can_generate():
        raise NotImplementedError
    ids = torch.arange(FIRST_TOKEN, FIRST_TOKEN + 5).unsqueeze(0)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    made: Tensor = out if isinstance(out, Tensor) else out.sequences
    return made


def rows() -> dict[tuple[str, str], str]:
    """Returns the lines of the table in the documentation, by class and architecture."""
    lines = re.findall(r"^\| `(\w+)` \| ([\w./-]+) \|.*$", TABLE.read_text(), re.MULTILINE)
    whole = re.findall(r"^\| `\w+` \| [\w./-]+ \|.*$", TABLE.read_text(), re.MULTILINE)
    return dict(zip(lines, whole, strict=True))


def document(results: Iterable[Row], day: str) -> str:
    """Returns the page with the table."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    results = sorted(results, key=lambda row: (row.kind, row.architecture))
    below = sorted({row.architecture for row in results if row.share < 0.99})
    lines = [
        "# Mixtures of experts",
        "",
        "Every class of transformers that keeps a matrix for each expert in one tensor, as its",
        "sources say, in every architecture that builds it. Each is built small, with random",
        "weights, and taken through its life in float32 on a CPU, with a scale a matrix.",
        "",
        "- **ternary**: of the model's linear weights, without routers and the output head.",
        "- **stays float**: what is missing there, with its share of this small model; it is no",
        "  expert's, and [Architectures](architectures.md) says why.",
        "- **same bits**: in training, in evaluation and deployed.",
        "- **reloads**: from the deployed file, and packed while the float file loads.",
        "- **generates**: the reloaded model the tokens of the deployed one; empty where the",
        "  architecture does not generate from a prompt alone.",
        "",
        f"Less than 99 % is ternary in {', '.join(below)}, by what is no expert's; at their real",
        "sizes experts weigh more. With nothing quantized, each class's ternary form computes",
        "what transformers' class computes: a test compares them all.",
        "",
        f"Made by `{COMMAND}` on {day}",
        f"(Python {platform.python_version()}, {versions}); CI compares every line with a new run.",
        "",
        f"Built by no architecture alone, and not looked at: {', '.join(sorted(NOT_BUILT))}.",
        "",
        "| class | architecture | ternary | stays float | same bits | reloads | generates |",
        "|---|---|--:|---|---|---|---|",
    ]
    lines += [row.line() for row in results]
    return "\n".join(lines) + "\n"
