"""``rotate``: a float model in, the same one in another basis out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Cli = Callable[..., Any]


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 60)[None]).logits
    return found


def test_a_model_that_computes_the_same(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "rotated"
    done = cli("rotate", states["float"], output, "--json")
    assert done.code == 0, done.error
    assert 0 < done.json["difference"] < 1e-3
    dtypes = [AutoModelForCausalLM.from_pretrained(one).dtype for one in (states["float"], output)]
    assert dtypes[0] == dtypes[1]
    expected, found = logits_of(states["float"]), logits_of(output)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert AutoTokenizer.from_pretrained(output)("A sentence")["input_ids"]
    weights = [AutoModelForCausalLM.from_pretrained(one).model.layers[0].mlp.up_proj.weight
               for one in (states["float"], output)]  # fmt: skip
    assert not torch.allclose(weights[0], weights[1], atol=1e-2)


def test_what_is_refused(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "rotated"
    for state in ("latent", "deployed"):
        done = cli("rotate", states[state], output)
        assert "rotate: MODEL must be in full precision, got" in str(done.error)
    assert not output.exists()
