"""Runs a program without an operating system on an x86-64 CPU that Bochs emulates.

    python run_bochs.py MODEL ELF [ARGUMENT]...

ELF is a static executable linked with freestanding.cpp. It starts in 64-bit mode with all vector
state enabled and its memory mapped one to one; what it prints comes to standard output, its status
becomes this program's. qemu's own emulation has no AVX-512, hence Bochs, by way of the package
bochscpu-python (whose version matters: MODELS are places in its list of CPU models).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from importlib import metadata
from pathlib import Path

import bochscpu
from bochscpu import _bochscpu, cpu, memory

VERSION = "0.4.0"
MODELS = {"skylake_x": 26, "icelake": 28, "sapphire_rapids": 30, "arrow_lake": 31}
MEMORY = 64 << 20
PAGE = 4096
# Page tables and arguments lie below the program, thread-local storage and the stack above it.
PML4, PDPT, DIRECTORY, ARGUMENTS, TABLES = 0x1000, 0x2000, 0x3000, 0x4000, 0x100000
TLS_END = MEMORY - PAGE
STACK_END = TLS_END - 16 * PAGE
PT_LOAD, PT_TLS = 1, 7
NEVER_RAN, EXCEPTION = 125, 124


def select_model(index: int) -> None:
    """Changes the CPU model, for which the package has a parameter but no function."""
    library = ctypes.CDLL(_bochscpu.__file__)
    get_parameter = library.sim_get_param_enum
    get_parameter.restype = ctypes.c_void_p
    set_parameter = library._ZN15bx_param_enum_c3setEl
    set_parameter.argtypes = [ctypes.c_void_p, ctypes.c_long]
    set_parameter(get_parameter(b"cpu.model"), index)


def load(elf: bytes, ram: mmap.mmap) -> int:
    """Copies the program to its addresses and returns its entry point."""
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    (count,) = struct.unpack_from("<H", elf, 56)
    for i in range(count):
        kind, _, offset, address, _, size, in_memory, align = struct.unpack_from(
            "<IIQQQQQQ", elf, headers + 56 * i
        )
        if kind == PT_TLS:
            address = TLS_END - -(-in_memory // align) * align
        elif kind != PT_LOAD:
            continue
        if address + in_memory > (TLS_END if kind == PT_TLS else STACK_END - 64 * PAGE):
            raise ValueError(f"run_bochs: {in_memory} bytes at {address:#x} do not fit")
        ram[address : address + size] = elf[offset : offset + size]
    # The thread pointer points to itself.
    struct.pack_into("<Q", ram, TLS_END, TLS_END)
    return entry


def map_memory(ram: mmap.mmap) -> None:
    """Makes one-to-one page tables, writable and executable; freestanding.cpp knows TABLES."""
    struct.pack_into("<Q", ram, PML4, PDPT | 3)
    struct.pack_into("<Q", ram, PDPT, DIRECTORY | 3)
    pages = range(0, MEMORY, PAGE)
    for i in range(len(pages) // 512):
        struct.pack_into("<Q", ram, DIRECTORY + 8 * i, TABLES + PAGE * i | 3)
    struct.pack_into(f"<{len(pages)}Q", ram, TABLES, *(page | 3 for page in pages))
    host = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    for page in pages:
        memory.page_insert(page, host + page)


def write_arguments(arguments: list[str], ram: mmap.mmap) -> None:
    """Writes argv at ARGUMENTS and its texts after it."""
    text = ARGUMENTS + 8 * (len(arguments) + 1)
    for i, argument in enumerate(arguments):
        data = argument.encode() + b"\0"
        struct.pack_into("<Q", ram, ARGUMENTS + 8 * i, text)
        ram[text : text + len(data)] = data
        text += len(data)


def segment(attributes: int, base: int = 0) -> bochscpu.Segment:
    """Returns a flat segment of ring 0."""
    made = bochscpu.Segment()
    made.present, made.selector, made.base = True, 8, base
    made.limit, made.attr = 0xFFFFFFFF, attributes
    return made


def start_state(entry: int, argc: int) -> bochscpu.State:
    """Returns 64-bit mode at the entry point, with SSE, AVX and AVX-512 enabled."""
    state = bochscpu.State()
    cpu.set_long_mode(state)
    state.cr3 = PML4
    state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # OSFXSR, OSXMMEXCPT, OSXSAVE
    state.xcr0 = 0xE7  # x87, SSE, AVX and the three parts of AVX-512
    state.mxcsr, state.mxcsr_mask, state.fpcw = 0x1F80, 0xFFFF, 0x37F
    state.cs = segment(0xA09B)
    state.ds = state.es = state.ss = state.gs = segment(0xC093)
    state.fs = segment(0xC093, TLS_END)
    state.rip, state.rsp, state.rflags = entry, STACK_END, 2
    state.rdi, state.rsi = argc, ARGUMENTS
    return state


def run(model: str, elf: Path, arguments: list[str]) -> int:
    """Runs the program to its end and returns its status."""
    select_model(MODELS[model])
    session = bochscpu.Session()
    ram = mmap.mmap(-1, MEMORY)
    map_memory(ram)
    argv = [elf.name, *arguments]
    write_arguments(argv, ram)
    session.cpu.state = start_state(load(elf.read_bytes(), ram), len(argv))
    status = NEVER_RAN

    def missing_page(address: int) -> None:
        print(f"run_bochs: no memory at {address:#x}, rip {session.cpu.rip:#x}", flush=True)
        os._exit(EXCEPTION)

    def exception(_: bochscpu.Session, _cpu: int, vector: int, error: int) -> None:
        where = f"rip {session.cpu.rip:#x}, cr2 {session.cpu.cr2:#x}"
        print(f"run_bochs: exception {vector}, error {error}, {where}", flush=True)
        os._exit(EXCEPTION)

    def clflush(_: bochscpu.Session, _cpu: int, address: int, _physical: int) -> None:
        print(ram[address : ram.find(b"\0", address)].decode(), end="", flush=True)

    def hlt(_: bochscpu.Session, _cpu: int) -> None:
        nonlocal status
        status = session.cpu.rax & 0xFF
        session.stop()

    session.missing_page_handler = missing_page
    hook = bochscpu.Hook()
    hook.exception, hook.clflush, hook.hlt = exception, clflush, hlt
    session.run([hook])
    return status


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in MODELS:
        sys.exit(f"usage: run_bochs.py {{{','.join(MODELS)}}} ELF [ARGUMENT]...")
    if metadata.version("bochscpu-python") != VERSION:
        sys.exit(f"run_bochs: bochscpu-python must be {VERSION}")
    code = run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    # Past the interpreter's end, where the package lists its own objects as leaked.
    os._exit(code)
