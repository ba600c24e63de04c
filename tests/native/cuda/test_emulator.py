"""The emulator itself: its fragment tables, and that it reports every kind of fault."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

# From the PTX ISA, "Matrix Fragments for mma.m16n8k32" and "mma.m16n8k16", written down register by
# register: groupID = lane >> 2, threadID_in_group t = lane % 4.
#   A of m16n8k32, 8-bit: a0-a3 row groupID, columns 4t to 4t + 3; a4-a7 row groupID + 8;
#     a8-a11 row groupID, columns + 16; a12-a15 row groupID + 8, columns + 16.
#   B of it: b0-b3 rows 4t to 4t + 3, column groupID; b4-b7 rows + 16.
#   A of m16n8k16, 16-bit: a0, a1 row groupID, columns 2t, 2t + 1; a2, a3 row groupID + 8;
#     a4, a5 row groupID, columns + 8; a6, a7 row groupID + 8, columns + 8.
#   B of it: b0, b1 rows 2t, 2t + 1, column groupID; b2, b3 rows + 8.
#   C and D of both: c0, c1 row groupID, columns 2t, 2t + 1; c2, c3 row groupID + 8.
A_REGISTERS = {
    32: [(0, 0), (8, 0), (0, 16), (8, 16)],
    16: [(0, 0), (8, 0), (0, 8), (8, 8)],
}
B_REGISTERS = {32: [0, 16], 16: [0, 8]}
PER_REGISTER = {32: 4, 16: 2}


# "Register Fragments and Shared Memory Matrix Layouts" of wgmma.m64nNk32: the four warps of a
# warpgroup hold 16 rows each, in the order above; D of n columns repeats c0-c3 every 8 columns.


def documented(k: int, operand: int, lane: int, i: int) -> int:
    group, thread, per = lane % 32 >> 2, lane % 4, PER_REGISTER[k]
    if operand == 3:
        row, column = A_REGISTERS[k][i // per]
        return (row + group + 16 * (lane // 32)) * 100 + column + per * thread + i % per
    if operand == 4:
        row = group + 8 * (i % 4 // 2) + 16 * (lane // 32)
        return row * 100 + 8 * (i // 4) + 2 * thread + i % 2
    if operand == 0:
        row, column = A_REGISTERS[k][i // per]
        return (row + group) * 100 + column + per * thread + i % per
    if operand == 1:
        return (B_REGISTERS[k][i // per] + per * thread + i % per) * 100 + group
    return (group + 8 * (i // 2)) * 100 + 2 * thread + i % 2


@pytest.mark.parametrize("k", [32, 16])
def test_fragment_tables_are_those_of_the_ptx_isa(host_library: ctypes.CDLL, k: int) -> None:
    shapes = {0: (16, k), 1: (k, 8), 2: (16, 8)}
    for operand, (rows, columns) in shapes.items():
        elements = rows * columns // 32
        places = set()
        for lane in range(32):
            for i in range(elements):
                place = host_library.bk_emulator_place(k, operand, lane, i)
                assert place == documented(k, operand, lane, i)
                places.add(place)
        assert places == {row * 100 + column for row in range(rows) for column in range(columns)}


def test_fragment_tables_of_wgmma(host_library: ctypes.CDLL) -> None:
    for operand, columns in ((3, 32), (4, 64)):
        places = set()
        for lane in range(128):
            for i in range(columns // 2):
                place = host_library.bk_emulator_place(32, operand, lane, i)
                assert place == documented(32, operand, lane, i)
                places.add(place)
        assert places == {row * 100 + column for row in range(64) for column in range(columns)}


def registers_of(matrix: Tensor, k: int, operand: int) -> Tensor:
    """The registers [32, 4 or 2] that hold a matrix, by the table above; [128, ...] of wgmma."""
    per = PER_REGISTER[k]
    lanes = 32 if operand < 3 else 128
    count = matrix.numel() // lanes
    found = torch.empty(lanes, count, dtype=matrix.dtype)
    for lane in range(lanes):
        for i in range(count):
            place = documented(k, operand, lane, i)
            found[lane, i] = matrix[place // 100, place % 100]
    return found.view(torch.int32) if per * matrix.element_size() == 4 else found


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_one_mma(host_library: ctypes.CDLL, kind: int) -> None:
    k = 32 if kind < 2 else 16
    if kind < 2:
        low, high, dtype = (0, 256, torch.uint8) if kind == 0 else (-128, 128, torch.int8)
        a = torch.randint(low, high, (16, k)).to(dtype)
        b = torch.randint(-128, 128, (k, 8)).to(torch.int8)
    else:
        dtype = torch.bfloat16 if kind == 2 else torch.float16
        a, b = (torch.randint(-15, 16, shape).to(dtype) for shape in ((16, k), (k, 8)))
    a_registers, b_registers = registers_of(a, k, 0), registers_of(b, k, 1)
    d = torch.empty(32, 4, dtype=torch.int32)
    host_library.bk_emulator_clear()
    for tensor, mode in ((a_registers, 0), (b_registers, 0), (d, 1)):
        host_library.bk_emulator_register(
            tensor.data_ptr(), tensor.numel() * tensor.element_size(), mode
        )
    text = host_library.bk_emulator_mma(
        kind, a_registers.data_ptr(), b_registers.data_ptr(), d.data_ptr()
    )
    assert text == b""
    found = d if kind < 2 else d.view(torch.float32)
    expected = registers_of(a.double() @ b.double(), k, 2)
    assert torch.equal(found.double(), expected)


@pytest.fixture
def hopper_library(host_library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library on a device that has wgmma."""
    host_library.bk_emulator_hopper(1)
    yield host_library
    host_library.bk_emulator_hopper(0)


def test_two_wgmma(hopper_library: ctypes.CDLL) -> None:
    """Columns 0 to 31 and 96 to 127 of a swizzled tile, the second product added to the first."""
    a = torch.randint(0, 256, (2, 64, 32)).to(torch.uint8)
    room = torch.empty(64 * 128 + 16, dtype=torch.int8)
    b = room[-room.data_ptr() % 16 :][: 64 * 128].view(64, 128)
    b.copy_(torch.randint(-128, 128, b.shape))
    registers = torch.stack([registers_of(part, 32, 3) for part in a])
    d = torch.empty(128, 32, dtype=torch.int32)
    hopper_library.bk_emulator_clear()
    for tensor, mode in ((registers, 0), (b, 0), (d, 1)):
        size = tensor.numel() * tensor.element_size()
        hopper_library.bk_emulator_register(tensor.data_ptr(), size, mode)
    text = hopper_library.bk_emulator_one_wgmma(registers.data_ptr(), b.data_ptr(), d.data_ptr())
    assert text == b""
    tokens = b.double()
    expected = a[0].double() @ tokens[:, :32].t() + a[1].double() @ tokens[:, 96:].t()
    assert torch.equal(d, registers_of(expected, 32, 4).int())


WGMMA_FAULTS = {
    0: "^$",
    1: "no proxy fence between its write and the barrier",
    2: "no proxy fence between its write and the barrier",
    3: "with no barrier after its write",
    4: "no wgmma_fence since the last group",
    5: "must begin at a multiple of 1024",
    6: "have different descriptors",
    7: "wgmma that was not waited for|sums are taken before",
    8: "that was never written",
    9: "registers of A changed",
    10: "sums were written before",
    11: "written while wgmma reads it",
    12: "sums are taken before",
    13: "sums are taken before",
    14: "race: thread .* writes shared byte",
    15: "an int32 sum of wgmma overflows",
    16: "^$",
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("which", WGMMA_FAULTS)
def test_faults_of_wgmma_are_reported(hopper_library: ctypes.CDLL, which: int, order: int) -> None:
    memory = torch.zeros(128, dtype=torch.int32)
    hopper_library.bk_emulator_clear()
    hopper_library.bk_emulator_order(order)
    hopper_library.bk_emulator_register(memory.data_ptr(), 512, 1)
    text = hopper_library.bk_emulator_wgmma_probe(which, memory.data_ptr()).decode()
    hopper_library.bk_emulator_order(0)
    assert re.search(WGMMA_FAULTS[which], text), text
    if which == 16:
        # The 8 ones of A's row meet the 8 ones of B's.
        assert memory[0].item() == -(2**31) + 7


CLUSTER_FAULTS = {
    0: "^$",
    1: "sent to a block that may not have begun",
    2: "that thread .* wrote, with no barrier between|read but was never written",
    3: "with no barrier of the cluster after it was read|wrote, with no barrier between",
    4: "sent to a block that has ended",
    5: "more bytes sent than were expected",
    6: "divergence: .* 64 for an inbox",
    7: "arrives twice",
    8: "without an arrival",
    9: "race: thread .* which thread .* has written",
    10: "a cluster of 2 blocks has no block 2",
    11: "has no inbox at 136",
    12: "opened after the cluster's first barrier",
    13: "expected twice",
    14: "wrote, with no barrier between|with no barrier of the cluster after it was read",
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("which", CLUSTER_FAULTS)
def test_faults_of_clusters_are_reported(
    hopper_library: ctypes.CDLL, which: int, order: int
) -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    hopper_library.bk_emulator_clear()
    hopper_library.bk_emulator_order(order)
    hopper_library.bk_emulator_register(memory.data_ptr(), 256, 1)
    text = hopper_library.bk_emulator_cluster_probe(which, memory.data_ptr()).decode()
    hopper_library.bk_emulator_order(0)
    assert re.search(CLUSTER_FAULTS[which], text), text
    if which == 0:
        # Twice the other block's number, and a thousand.
        threads = torch.arange(32, dtype=torch.int32)
        assert torch.equal(memory.view(2, 32), 2 * threads + torch.tensor([[1200], [1000]]).int())


def test_a_device_without_wgmma_and_clusters(host_library: ctypes.CDLL) -> None:
    memory = torch.zeros(128, dtype=torch.int32)
    assert b"has no wgmma" in host_library.bk_emulator_wgmma_probe(0, memory.data_ptr())
    assert b"invalid config" in host_library.bk_emulator_cluster_probe(0, memory.data_ptr())


FAULTS = {
    0: "^$",
    1: "^$",
    2: "^$",
    3: "race: thread .* shared byte .* with no barrier",
    4: "race: thread .* shared byte .* with no barrier",
    5: "race: thread .* shared byte .* with no barrier",
    6: "read but was never written",
    7: "read before its cp.async was waited for",
    8: "race: thread .* shared byte|before its cp.async was waited for",
    9: "read before its cp.async was waited for",
    10: "divergence: 32 threads have returned, 0 wait in a warp, 32 at a block barrier",
    11: "divergence: lanes of a warp meet in",
    12: "divergence: 2 threads have returned, 62 wait in a warp",
    13: "shared memory has 1024 bytes, access at",
    14: "outside every buffer",
    15: "misaligned",
    16: "an input is written",
    17: "race: two threads of one launch meet",
    18: "read but was never written",
    19: "divergence: block barriers at",
    20: "written while cp.async fills it",
    21: "global access before the wait for earlier kernels",
    22: "an int32 sum of mma overflows",
    23: "^$",
    24: "^$",
    25: "read before its cp.async was waited for",
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("which", FAULTS)
def test_faults_are_reported(host_library: ctypes.CDLL, which: int, order: int) -> None:
    room = torch.zeros(68, dtype=torch.int32)
    start = -room.data_ptr() // 4 % 4
    data, memory = room[start : start + 64], torch.zeros(64, dtype=torch.int32)
    data.copy_(torch.arange(64))
    host_library.bk_emulator_clear()
    host_library.bk_emulator_order(order)
    host_library.bk_emulator_register(memory.data_ptr(), 256, 1)
    host_library.bk_emulator_register(data.data_ptr(), 256, 0)
    text = host_library.bk_emulator_probe(which, memory.data_ptr(), data.data_ptr()).decode()
    host_library.bk_emulator_order(0)
    assert re.search(FAULTS[which], text), text
    if which == 23:
        # Of both operands only every fourth column has a one.
        assert memory[0].item() == -(2**31) + 7
    if which == 24:
        assert torch.equal(memory, torch.arange(64, dtype=torch.int32) * (torch.arange(64) % 2))
