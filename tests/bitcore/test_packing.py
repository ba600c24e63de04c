from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitcore
from bitcore import pack_ternary, unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.ops import has_invalid_code
from bitcore.packing import join_rows


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip(out_features: int, in_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((out_features + 3) // 4, in_features)
    assert torch.equal(unpack_ternary(packed, out_features), codes)
    assert not has_invalid_code(packed)


def test_the_layout_is_the_documented_one() -> None:
    # N = 6, so R = 2: byte [r, k] holds rows r, r + 2, r + 4 and a row of padding, code 0.
    codes = torch.tensor([[1], [-1], [0], [1], [-1], [0]], dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.tolist() == [[2 | 1 << 2 | 0 << 4 | 1 << 6], [0 | 2 << 2 | 1 << 4 | 1 << 6]]


@pytest.mark.parametrize(
    ("pieces", "rows"), [(1, 7), (2, 4), (2, 6), (2, 35), (3, 5), (4, 16), (5, 1), (8, 12)]
)
def test_pieces_are_joined_as_rows_packed_at_once(pieces: int, rows: int) -> None:
    codes = torch.randint(-1, 2, (pieces * rows, 9), dtype=torch.int8)
    packed = torch.stack([pack_ternary(part) for part in codes.chunk(pieces)])
    assert torch.equal(join_rows(packed, pieces * rows), pack_ternary(codes))


def test_same_bytes_as_transformers_bitnet() -> None:
    from transformers.integrations.bitnet import unpack_weights

    codes = torch.randint(-1, 2, (64, 48), dtype=torch.int8)
    unpacked = unpack_weights(pack_ternary(codes), dtype=torch.float32)
    assert torch.equal(unpacked, codes.float())


def test_bad_input() -> None:
    with pytest.raises(ArgumentTypeError, match="int8, got torch.float32"):
        pack_ternary(torch.zeros(4, 4))
    for shape in ((0, 4), (4, 0), (4,)):
        with pytest.raises(ArgumentError, match="at least 1"):
            pack_ternary(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ArgumentError, match="from 0 to 2"):
        pack_ternary(torch.tensor([[0, 2]], dtype=torch.int8))
    with pytest.raises(ArgumentTypeError):
        unpack_ternary(torch.zeros(1, 4, dtype=torch.int8), 4)
    for rows, out_features in ((1, 5), (2, 4), (1, 0)):
        with pytest.raises(ArgumentError, match="for out_features"):
            unpack_ternary(torch.zeros(rows, 4, dtype=torch.uint8), out_features)


@pytest.mark.parametrize("lane", range(4))
@pytest.mark.parametrize("rows", [1, 40, 70000])
def test_invalid_code_is_found_in_every_lane(
    isa: str, num_threads: int, rows: int, lane: int
) -> None:
    for place in (0, 3 * rows // 5, rows - 1):
        packed = torch.full((rows, 7), 0b10_01_00_10, dtype=torch.uint8)
        assert not has_invalid_code(packed)
        packed[place, 5] |= 3 << (2 * lane)
        assert has_invalid_code(packed)
        assert has_invalid_code(packed[:, 2:])
        assert not has_invalid_code(packed[:, :5])
        with bitcore.use_backend("reference"):
            assert has_invalid_code(packed)


def test_invalid_codes_are_looked_for_in_bytes() -> None:
    assert not has_invalid_code(torch.empty(0, 7, dtype=torch.uint8))
    with pytest.raises(ArgumentTypeError, match=r"uint8, got torch.int8"):
        has_invalid_code(torch.zeros(3, dtype=torch.int8))
