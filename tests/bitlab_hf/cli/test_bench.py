"""``bitlab bench``: what it measures and writes, not how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitcore.errors import ArgumentError, BackendError
from tests.conftest import native_kernels

Cli = Callable[..., Any]
QUICK = ("--seconds", "0.001", "--cold-mb", "0.01")


def test_shapes_of_a_model(cli: Cli, states: dict[str, Path]) -> None:
    done = cli("bench", states["deployed"], "--tokens", 1, *QUICK, "--json")
    assert done.code == 0, done.error
    rows = done.json["rows"]
    shapes = {(row["outputs"], row["inputs"]) for row in rows}
    assert len(shapes) == len(rows) == 4
    for row in rows:
        assert row["tokens"] == 1
        assert set(row["us"]) == {"bitlab", "torch float32", "torch bfloat16"}
        for timing in row["us"].values():
            assert 0 < timing["p10"] <= timing["p50"] <= timing["p90"]
    assert done.json["isa"] == native_kernels().isa
    assert done.json["machine"]["versions"]["torch"] == torch.__version__
    assert isinstance(cli("bench", states["latent"], *QUICK).error, ArgumentError)


def test_given_shapes(cli: Cli) -> None:
    threads = torch.get_num_threads()
    isa = native_kernels().isa
    done = cli("bench", "--shape", "64x128", "--shape", "12x64", "--tokens", 1, "--tokens", 3,
               "--threads", 1, "--threads", 2, "--isa", "portable", *QUICK, "--json")  # fmt: skip
    assert done.code == 0, done.error
    assert done.json["isa"] == "portable"
    assert len(done.json["rows"]) == 8
    # What it set is put back.
    assert torch.get_num_threads() == threads
    assert native_kernels().isa == isa
    shown = cli("bench", "--shape", "64x128", *QUICK).out
    assert isa in shown
    assert "64x128" in shown


@pytest.mark.parametrize("shape", ["64", "64x", "0x64", "64x64x64", "axb"])
def test_bad_shapes(cli: Cli, shape: str) -> None:
    done = cli("bench", "--shape", shape)
    assert done.code == 2
    assert "4096x14336" in done.err


def test_bad_isa(cli: Cli) -> None:
    assert isinstance(cli("bench", "--isa", "mmx", *QUICK).error, BackendError)
    assert cli("bench", "--tokens", 0).code == 2


def test_more_threads_than_torch_survives(cli: Cli) -> None:
    """Torch starts as many as it is told, and the process ends where there are no more."""
    before = torch.get_num_threads()
    for command in (("bench",), ("eval", "model"), ("generate", "model", "text")):
        done = cli(*command, "--threads", 100000)
        assert done.code == 2
        assert "--threads" in done.err
        assert "less than or equal to" in done.err
    assert torch.get_num_threads() == before
