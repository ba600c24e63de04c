"""Every fault of the mutation test still finds its line in the kernels; mutate.py runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.cuda.build_host import sources
from tests.native.cuda.mutate import ROOT, faulty_text, reachable
from tests.native.cuda.mutation import Mutation
from tests.native.cuda.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_can_be_put_in(mutation: Mutation) -> None:
    assert faulty_text(mutation) != (ROOT / mutation.path).read_text()
    (unit,) = (source for source in sources(ROOT) if source.stem == mutation.unit)
    assert Path(mutation.path).name in reachable(unit)
