"""The page around the plots: one file, no request to anywhere, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from bitlab_hf.report.plots import Panel, exp, panels
from bitlab_hf.report.run import Run
from bitlab_hf.report.vega import scripts
from bitlab_hf.train.recipe import RECIPES, Recipe


def summary(run: Run) -> dict[str, Any]:
    """Returns a run's figures: what the page's head shows, and what ``--json`` prints."""
    _, nats = run.logged("eval_loss")
    _, losses = run.logged("loss")
    _, shares = run.logged("ternary/zero")
    _, flipped = run.logged("ternary/flipped")
    base = None if run.baseline is None else run.baseline[0]
    return {
        "name": run.facts.get("name") or run.folder.resolve().name,
        "steps": run.steps,
        "max_steps": run.max_steps,
        "tokens": run.tokens,
        "layers": len(run.layers),
        "loss": losses[-1] if losses else None,
        "perplexity": exp(nats[-1]) if nats else None,
        "baseline_perplexity": None if base is None else exp(base),
        "gap_nats": nats[-1] - base if nats and base is not None else None,
        "zero": shares[-1] if shares else None,
        "flipped": flipped[-1] if flipped else None,
    }


def render(run: Run) -> str:
    """Returns a run's report as the text of one HTML file.

    Its policy allows nothing to be fetched, and no script but its own, which draws the plots.

    Raises:
        MissingExtraError: The package ``vl-convert-python`` is not installed.
    """
    style = (files("bitlab_hf.report") / "page.css").read_text(encoding="utf-8")
    script = scripts()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = summary(run)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = escape(str(found["name"]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: BitLab's report</title>
<style>{style}</style>
</head>
<body>
<header><h1>{name}</h1><p>{escape(_subtitle(run))}</p></header>
<noscript><p>This page's plots are drawn by a script of its own.</p></noscript>
<section class="tiles">{_tiles(run, found)}</section>
<main>{"".join(map(_panel, panels(run)))}</main>
{_facts(run)}
{_layers(run)}
<footer>bitlab report</footer>
<script>{script}</script>
</body>
</html>
"""


def _panel(panel: Panel) -> str:
    body = f'<p class="missing">{escape(panel.note)}</p>'
    if panel.spec is not None:
        spec = json.dumps(panel.spec, separators=(",", ":")).replace("<", "\\u003c")
        body = (
            f'<div id="{panel.name}"></div><figcaption>{escape(panel.note)}</figcaption>'
            f'<script type="application/json" data-for="{panel.name}">{spec}</script>'
        )
    wide = ' class="wide"' if panel.wide else ""
    return f"<figure{wide}><h2>{escape(panel.head)}</h2>{body}</figure>"


def number(value: float) -> str:
    """Returns a number with three digits, as short as it can be read."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}" if abs(value) < 100 else f"{value:.4g}"


def percent(value: float) -> str:
    """Returns a share as a percentage."""
    return f"{number(100 * value)} %"


def _subtitle(run: Run) -> str:
    facts = run.facts
    parts = [str(facts.get("architecture") or "")]
    weights, of = facts.get("ternary_weights"), facts.get("parameters")
    if isinstance(weights, int) and isinstance(of, int) and of:
        parts.append(f"{of:,} parameters, {100 * weights / of:.0f} % of them ternary")
    parts.append(f"recipe: {recipe_name(run.recipe)}")
    return " · ".join(part for part in parts if part)


def recipe_name(recipe: dict[str, Any] | None) -> str:
    """Returns a recipe's name, or what sets it apart from the plain one."""
    if recipe is None:
        return "none (a plain Trainer)"
    for name, known in RECIPES.items():
        if known.to_dict() == recipe:
            return name
    plain = Recipe().to_dict()
    changed = [f"{key}={value}" for key, value in recipe.items() if plain.get(key) != value]
    return ", ".join(changed) or "plain"


def _tiles(run: Run, found: dict[str, Any]) -> str:
    tiles: list[tuple[str, str, str]] = []
    if found["perplexity"] is not None:
        base = found["baseline_perplexity"]
        under = (
            "full precision: not recorded" if base is None else f"full precision: {number(base)}"
        )
        tiles.append(("perplexity", number(found["perplexity"]), under))
    if found["gap_nats"] is not None:
        ratio = math.exp(min(found["gap_nats"], 50.0))
        tiles.append(("gap", f"{found['gap_nats']:.3f} nats", f"{number(ratio)} times"))
    if found["loss"] is not None:
        tiles.append(("training loss", number(found["loss"]), "at the last log"))
    goal = found["max_steps"]
    tiles.append(("steps", f"{found['steps']:,}", f"of {goal:,}" if goal else "planned: unknown"))
    tokens = found["tokens"]
    tiles.append(("tokens", "-" if tokens is None else f"{tokens:,}",
                  "not counted" if tokens is None else "seen in training"))  # fmt: skip
    if found["zero"] is not None:
        tiles.append(("zeros", percent(found["zero"]), "of all codes, at the last log"))
    if found["flipped"] is not None:
        tiles.append(("flipped", percent(found["flipped"]), "of all codes, between two logs"))
    return "".join(
        f"<div><span>{escape(head)}</span><b>{escape(value)}</b><span>{escape(under)}</span></div>"
        for head, value, under in tiles
    )


def _facts(run: Run) -> str:
    rows: list[tuple[str, Any]] = [
        (key, run.facts[key])
        for key in ("model", "architecture", "parameters", "ternary_weights")
        if key in run.facts
    ]
    rows += [(f"recipe: {key}", value) for key, value in (run.recipe or {}).items()]
    for group in ("scheme", "arguments", "versions"):
        held = run.facts.get(group)
        if isinstance(held, dict):
            rows += [(f"{group}: {key}", value) for key, value in held.items()]
    cells = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(_plain(value))}</td></tr>" for key, value in rows
    )
    return f"<details><summary>Configuration</summary><table>{cells}</table></details>"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _layers(run: Run) -> str:
    columns: Sequence[tuple[str, str, Any]] = (
        ("-1", "negative", percent), ("0", "zero", percent), ("+1", "positive", percent),
        ("flipped", "flipped", percent), ("scale", "scale", number),
        ("saturated", "saturated", percent), ("largest input", "input_max", number),
    )  # fmt: skip
    heads = "".join(f"<th>{escape(head)}</th>" for head, _, _ in columns)
    lines = []
    for place, name in enumerate(run.layers):
        cells = []
        for _, quantity, write in columns:
            series = run.values[quantity]
            value = series[-1][1][place] if series else None
            cells.append(f"<td>{'-' if value is None else escape(write(value))}</td>")
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return (
        "<details><summary>The layers at the last log</summary><table class='numbers'>"
        f"<tr><th>layer</th>{heads}</tr>{''.join(lines)}</table></details>"
    )
