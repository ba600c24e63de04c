"""Every fault of the mutation test still finds its line in the kernels; mutate.py runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.native.cuda.mutate import FOLDERS, ROOT, apply
from tests.native.cuda.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_can_be_put_in(tmp_path: Path, mutation: Mutation) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    apply(mutation, tmp_path)
    before = (ROOT / mutation.path).read_text()
    assert (tmp_path / mutation.path).read_text() != before
