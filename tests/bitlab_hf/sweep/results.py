"""What became of an architecture, and the table that says so."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bitlab_hf.sweep.floats import without_numbers
from tests.bitlab_hf.sweep.special import NOT_SWEPT

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
COMMAND = "python scripts/sweep.py --write docs/architectures.md"


@dataclass
class Result:
    """What became of an architecture.

    Attributes:
        architecture: The name of transformers.
        model: The class that was built.
        outcome: ``"works"``, ``"partly"`` (some layers stay float, for a reason that was said),
            ``"refused"`` (by an error of BitLab), ``"fault"`` or ``"not swept"``.
        converted: How many layers are ternary.
        share: Their part of the model's weights.
        left: What stays float: ``{kind of layer: why}``.
        faults: ``[step, what is wrong]`` of each fault.
        notes: What a reader may want to know and no fault is.
        reason: Why it was refused or not swept.
        seconds: Of computing.
    """

    architecture: str
    model: str = ""
    outcome: str = "works"
    converted: int = 0
    share: float = 0.0
    left: dict[str, str] = field(default_factory=dict)
    faults: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def row(result: Result) -> str:
    """Returns the line of the table for a result."""
    cells = [result.architecture, f"`{result.model}`", result.outcome, _why(result)]
    return f"| {' | '.join(cells)} |"


def _why(result: Result) -> str:
    if result.outcome == "fault":
        return _escaped("; ".join(f"{step}: {what}" for step, what in result.faults))
    if result.reason:
        return _escaped(without_numbers(result.reason))
    kinds: dict[str, list[str]] = {}
    for kind, why in result.left.items():
        kinds.setdefault(why, []).append(f"`{kind}`")
    return "; ".join(f"{', '.join(names)}: {_escaped(why)}" for why, names in kinds.items())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def rows() -> dict[str, str]:
    """Returns the lines of the table in the documentation, by architecture."""
    lines = re.findall(r"^\| ([\w./-]+) \| `.*$", TABLE.read_text(), re.MULTILINE)
    found = re.findall(r"^\| [\w./-]+ \| `.*$", TABLE.read_text(), re.MULTILINE)
    return dict(zip(lines, found, strict=True))


def document(results: Iterable[Result], day: str) -> str:
    """Returns the page with the table."""
    results = sorted(results, key=lambda result: result.architecture)
    counts = Counter(result.outcome for result in results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# Architectures",
        "",
        "What becomes of transformers' architectures. Each is built small from its configuration,",
        "with random weights, and taken through the whole path in float32 on a CPU: latent, a step",
        "of training, saved, reloaded, deployed, saved, reloaded, and packed while it loads. Every",
        "step is compared with the one before; a reloaded deployed model has the same bits.",
        "",
        f"Made by `{COMMAND}` on {day}",
        f"(Python {platform.python_version()}, {versions}); CI compares every line with a new run.",
        "",
        f"- **works** ({counts['works']}): every linear layer but the output head is ternary.",
        f"- **partly** ({counts['partly']}): the layers in the last column stay float.",
        f"- **refused** ({counts['refused']}): BitLab says so when the model is loaded.",
    ]
    if counts["fault"]:
        lines.append(f"- **fault** ({counts['fault']}): something is wrong, and is to be mended.")
    lines += [
        "",
        "| architecture | built as | | what stays float, or why not |",
        "|---|---|---|---|",
    ]
    lines += [row(result) for result in results if result.outcome != "not swept"]
    lines += ["", "## Not swept", ""]
    reasons: dict[str, list[str]] = {}
    for name, reason in NOT_SWEPT.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"- {reason}: {', '.join(names)}." for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"
