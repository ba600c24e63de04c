"""Every architecture of transformers through the whole path, against the table in the docs."""

from __future__ import annotations

import pytest

from tests.bitlab_hf.sweep.models import architectures
from tests.bitlab_hf.sweep.results import COMMAND, row, rows
from tests.bitlab_hf.sweep.run import sweep

# One of each kind, in every run of the tests: plain, tied, encoder-decoder, experts, reads its
# weights itself, refused, state space, vision, sound, vision with language.
ALWAYS = [
    "bert",
    "gemma2",
    "gpt2",
    "hrm_text",
    "llama",
    "llava",
    "mamba",
    "mixtral",
    "t5",
    "whisper",
]
ALL = architectures()


def check(architecture: str) -> None:
    (result,) = sweep([architecture])
    assert result.outcome != "not swept", result.reason
    # Silently wrong, or an error that does not say what it is about.
    assert not result.faults, "\n".join(f"{step}: {what}" for step, what in result.faults)
    assert result.outcome != "refused" or result.reason
    assert rows().get(architecture) == row(result), f"the table is old: {COMMAND}"


@pytest.mark.parametrize("architecture", ALWAYS)
def test_each_kind(architecture: str) -> None:
    check(architecture)


@pytest.mark.ci
@pytest.mark.parametrize("architecture", [name for name in ALL if name not in ALWAYS])
def test_architecture(architecture: str) -> None:
    check(architecture)


def test_the_table_has_all_and_no_others() -> None:
    assert list(rows()) == ALL
    assert len(ALL) >= 450
