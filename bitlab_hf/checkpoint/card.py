"""The model card of a deployed model: facts that the model shows or somebody recorded."""

from __future__ import annotations

import hashlib
import html
import json
import keyword
import math
import os
import re
from collections import Counter
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.embedding import ternary_embeddings
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.int8 import int8_layers, int8_modules, is_borrower
from bitlab_hf.model.parts import shares, whole_shapes
from bitlab_hf.model.rows import stored_elsewhere
from bitlab_hf.model.tree import quantized_layers, ternary_modules

CARD = "README.md"
# In a clone: no index has the package.
INSTALL = "pip install ."
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_BEGIN, _END = "<!-- bitlab facts -->", "<!-- end of bitlab facts -->"
_BLOCK = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
# At the end of a card: what shows that nobody has edited it.
_SEAL = re.compile(r"<!-- bitlab card ([0-9a-f]{16}) -->\n")


def record_facts(directory: str | os.PathLike[str], facts: Facts) -> None:
    """Adds facts to a saved model, and to its card where BitLab wrote it.

    Args:
        directory: A model's folder.
        facts: What to add; what is there under the same name is replaced.

    Raises:
        ArgumentError: The folder holds no model.
        CheckpointError: The facts that it holds are damaged.
    """
    folder = Path(directory)
    if not (folder / "config.json").exists():
        raise ArgumentError(f"record_facts: {folder} must hold a model, got no config.json")
    facts = Facts.load(folder).merged(facts)
    facts.save(folder)
    card = folder / CARD
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8")
    now = with_facts(text, facts)
    if now != text:
        write_atomically(card, sealed(now) if is_untouched(text) else now)


def with_facts(text: str, facts: Facts) -> str:
    """Returns a card with these facts in the place where BitLab keeps them, if it has one."""
    if not _BLOCK.search(text):
        return text
    text = _BLOCK.sub(lambda _: _facts_block(facts), text)
    if facts.base_model is not None:
        lines = [
            line
            for line in text.split("\n")
            if not line.startswith(("base_model:", "base_model_relation:"))
        ]
        text = "\n".join([lines[0], *_base_lines(facts.base_model), *lines[1:]])
    return text


def sealed(text: str) -> str:
    """Returns a card with a digest of it at its end, in place of one that is there."""
    text = _SEAL.sub("", text)
    return f"{text}<!-- bitlab card {_digest(text)} -->\n"


def is_untouched(text: str) -> bool:
    """Tells whether a card is as BitLab wrote it."""
    found = _SEAL.search(text)
    return found is not None and found[1] == _digest(_SEAL.sub("", text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _base_lines(base: str) -> list[str]:
    return [f"base_model: {json.dumps(base)}", 'base_model_relation: "quantized"']


def _facts_block(facts: Facts) -> str:
    """Returns the part of the card that recorded facts make; with none, two markers."""
    made = [("trained from", facts.base_model), ("recipe", facts.recipe), ("data", facts.data)]
    rows = [(name, value) for name, value in made if value]
    parts = [_BEGIN]
    if rows:
        parts.append("## How it was made\n\n" + _table(rows))
    if facts.perplexities:
        values = [(name, f"{value:.3f}") for name, value in facts.perplexities.items()]
        parts.append("## Perplexity\n\n" + _table(values))
    if facts.speeds:
        values = [(name, f"{value:.1f} tokens/s") for name, value in facts.speeds.items()]
        parts.append("## Speed\n\n" + _table(values))
    return "\n\n".join([*parts, _END])


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [[_plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in cells)])


def _plain(text: str) -> str:
    """Returns a text that is one line and no HTML."""
    return html.escape(" ".join(text.split()), quote=False)


def _architecture(model: PreTrainedModel) -> str:
    """Returns the class that config.json names, if that is a name; else the model's own."""
    named = getattr(model.config, "architectures", None)
    first = named[0] if isinstance(named, (list, tuple)) and named else None
    # It becomes code.
    if isinstance(first, str) and first.isascii() and first.isidentifier():
        return type(model).__name__ if keyword.iskeyword(first) else first
    return type(model).__name__


def _call(name: str) -> str:
    return f"from_pretrained({json.dumps(name, ensure_ascii=False)})"


def renamed(text: str, old: str, new: str) -> str:
    """Returns a card in which a model has another name."""
    now = text.replace(_call(old), _call(new)).replace(f"\n# {_plain(old)}\n", f"\n# {new}\n")
    return sealed(now) if is_untouched(text) else now


def model_card(model: PreTrainedModel, title: str, facts: Facts | None = None) -> str:
    """Returns the README.md of a deployed model, with the metadata that the hub reads.

    Nothing is in it that the model does not show or ``facts`` say; the base model is named where
    the model was loaded from the hub.

    Args:
        model: A deployed model.
        title: Its name.
        facts: What the model does not show.
    """
    facts = facts or Facts()
    layers = [found.module for found in quantized_layers(model)]
    elsewhere = stored_elsewhere(model)
    stored = [
        found.module
        for found in ternary_modules(model)
        if elsewhere.isdisjoint(f"{name}.qweight" for name in found.names)
    ]
    sizes = [one.in_features * one.out_features * shares(one) for one in stored]
    packed = {
        id(one if one.packs_itself else one.qweight): size
        for one, size in zip(stored, sizes, strict=True)
    }
    embeddings = [found.module for found in ternary_embeddings(model)]
    experts = [found.module for found in expert_modules(model)]
    stacks = [stack for one in experts for stack in one.stacks.values()]
    held = [
        (stack, shares(found.module))
        for found in expert_modules(model)
        for stack in found.module.stacks.values()
        if elsewhere.isdisjoint(f"{name}.{stack.name}_qweight" for name in found.names)
    ]
    ternary = sum(packed.values()) + sum(stack.weights * count for stack, count in held)
    matrices = len(packed) + sum(stack.experts * stack.parts * count for stack, count in held)
    int8 = {
        id(one.module.qweight): one.module.qweight.numel()
        for one in int8_modules(model)
        if not is_borrower(model, one)
    }
    int8_linears = int8.keys() & {id(one.module.qweight) for one in int8_layers(model)}
    of_linears = sum(int8[key] for key in int8_linears)
    of_head = sum(int8.values()) - of_linears
    whole = whole_shapes(model)
    floats = {
        id(one): math.prod(whole.get(name, one.shape))
        for name, one in model.named_parameters(remove_duplicate=False)
        if one.is_floating_point() and name not in elsewhere
    }
    schemes = Counter(_scheme(layer.quant_config) for layer in layers)
    of_experts = Counter(_scheme(stack.config) for stack in stacks)
    rows = [f"| {count} layers | {scheme} |" for scheme, count in schemes.items()]
    rows += [f"| {count} tensors of experts | {scheme} |" for scheme, count in of_experts.items()]
    rows += [f"| the embedding | {_scales(one.quant_config)} |" for one in embeddings[:1]]
    parts = [f"{len(layers)} linear layers"]
    parts += [f"the experts of {len(experts)} layers"] if experts else []
    parts += ["the embedding"] if embeddings else []
    # It stands in the file empty, see `packed_state`.
    missing = (
        f"{quantized_layers(model)[0].names[0]}.weight"
        if layers
        else f"{expert_modules(model)[0].names[0]}.{stacks[0].name}"
    )
    architecture = _architecture(model)
    causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["bitlab", "ternary", "1.58-bit", "quantized"],
    }
    if causal:
        metadata["pipeline_tag"] = "text-generation"
    loaded = str(getattr(model.config, "_name_or_path", "") or "")
    if facts.base_model is None and _REPOSITORY.fullmatch(loaded) and not Path(loaded).exists():
        facts = facts.merged(Facts(base_model=loaded))
    base = _base_lines(facts.base_model) if facts.base_model else []
    size = _stored_bytes(model)
    half = 2 * (ternary + sum(int8.values()) + sum(floats.values()))
    auto = "AutoModelForCausalLM" if causal else architecture
    lines = [
        # JSON values are YAML.
        "\n".join(["---", *base, *(f"{k}: {json.dumps(v)}" for k, v in metadata.items()), "---"]),
        f"# {_plain(title)}",
        f"A ternary (1.58-bit) {architecture}, packed by BitLab: the weights of "
        f"{' and of '.join(parts)} are -1, 0 or +1 times a scale, four to a byte.",
        "## Load it",
        "In a clone of BitLab (the package `bitlab-hf`), once:",
        f"```bash\n{INSTALL}\n```",
        f"```python\nfrom transformers import {auto}\n\nmodel = {auto}.{_call(title)}\n```",
        "No import of BitLab is needed. Without it installed, loading fails with a size mismatch "
        f"of `{missing}` instead of giving random weights.",
        "## What is in it",
        "| | |\n|---|---|\n"
        f"| ternary weights | {ternary:,} in {matrices} matrices |\n"
        f"| bits a weight, scales included | {bits_per_weight(model):.2f} |\n"
        + (f"| output head, int8 | {of_head:,} |\n" * bool(of_head))
        + (f"| {len(int8_linears)} linear layers, int8 | {of_linears:,} |\n" * bool(of_linears))
        + f"| other parameters | {sum(floats.values()):,}, {_dtypes(model)} |\n"
        + f"| size | {size / 1e6:.1f} MB; {half / 1e6:.1f} MB in 16 bits a weight |\n"
        + "\n".join(rows),
        _facts_block(facts),
    ]
    return sealed("\n\n".join(lines) + "\n")


def _stored_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of what a file of the model holds; a tensor held twice counts once."""
    elsewhere, whole = stored_elsewhere(model), whole_shapes(model)
    # Not by address: a skeleton's tensors have none.
    sizes = {
        id(tensor): tensor.itemsize * math.prod(whole.get(name, tensor.shape))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in elsewhere
    }
    return sum(sizes.values())


def _scales(config: BitQuantConfig) -> str:
    grouped = f" of {config.group_size}" if config.group_size else ""
    grouped += " in float32" if config.group_scale_dtype == "float32" else ""
    return f"scales {config.weight_granularity.replace('_', ' ')}{grouped}"


def _scheme(config: BitQuantConfig) -> str:
    scales = _scales(config)
    if config.activation_dtype == "float32":
        return f"{scales}, activations not quantized"
    return f"{scales}, activations int8 {config.activation_granularity.replace('_', ' ')}"


def _dtypes(model: nn.Module) -> str:
    names = Counter(
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()
    )
    return " and ".join(sorted(names))
