"""Has a QEMU before 8.2 open the RAM's file that it maps privately for reading only.

Such a QEMU opens the file for writing as well, though it never writes to it, and can't be told otherwise. A guest that took it over could write to
the file, and so into every other machine on it. So QEMU is started with a library of 25 bytes of code ahead of the C library: whoever asks there
for O_RDWR, and for nothing else, gets O_RDONLY. QEMU asks so for the RAM's file only; all other files it opens with O_CLOEXEC.

The library is no wall. The wall is that nobody may write to the file, and that the descriptor which QEMU inherits is open for reading: without the library
QEMU is refused what it asks for, and does not start.

Sources: elf(5), ld.so(8); `file_ram_open` in QEMU's ``softmmu/physmem.c``.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from ._process import InheritedFds, minimal_environment, run_owned

_CODE: Final = bytes.fromhex(
    "83fe02 7502 31f6"  # cmp esi, O_RDWR; jne +2; xor esi, esi
    "89d1"  # mov ecx, edx: the mode
    "89f2"  # mov edx, esi: the flags
    "4889fe"  # mov rsi, rdi: the path
    "bf9cffffff"  # mov edi, AT_FDCWD
    "ff25"  # jmp [rip + ...]: to openat64()
)
#: What the code calls, and the names that it goes by. Those with a 2 are called where the C library checks the arguments.
_CALLED: Final = b"openat64"
_CALLERS: Final = (b"open", b"open64", b"__open_2", b"__open64_2")

_HEADER, _SEGMENT, _SYMBOL, _RELOCATION, _ENTRY = 64, 56, 24, 24, 16
_PAGE: Final = 0x1000
#: ET_DYN, EM_X86_64; PT_LOAD, PT_DYNAMIC, PT_GNU_STACK; PF_R | PF_X, PF_R | PF_W.
_SHARED, _X86_64 = 3, 62
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_READ_EXECUTE, _READ_WRITE = 5, 6
#: STB_GLOBAL and STT_FUNC; R_X86_64_GLOB_DAT.
_GLOBAL_FUNCTION, _ADDRESS_OF = 0x12, 6
#: Of the dynamic section.
_STRTAB, _SYMTAB, _RELA, _RELASZ, _RELAENT, _STRSZ, _SYMENT, _NULL = 5, 6, 7, 8, 9, 10, 11, 0
_GNU_HASH: Final = 0x6FFFFEF5

_PRELOAD: Final = "LD_PRELOAD"
#: Has the dynamic linker list what it has loaded, in place of running the program.
_LIST: Final = 'export LD_TRACE_LOADED_OBJECTS=1; exec "$@"'


@functools.cache
def make_library() -> bytes:
    """Return the library: a shared object of one page of code, and one for the address of what that calls."""
    names = b"\0".join((b"", _CALLED, *_CALLERS, b""))
    count = 2 + len(_CALLERS)  # the first symbol is none
    symbols = _HEADER + 4 * _SEGMENT
    strings = symbols + count * _SYMBOL
    hashes = _align(strings + len(names))
    relocations = _align(hashes + 28 + 4 * len(_CALLERS))
    code = relocations + _RELOCATION
    dynamic = _align(code + len(_CODE) + 4)
    address = _PAGE + dynamic + 9 * _ENTRY

    # What is written to is in the same bytes of the file, but a page further up in memory.
    text = _CODE + struct.pack("<i", address - (code + len(_CODE) + 4))
    table = bytes(_SYMBOL)
    for name in (_CALLED, *_CALLERS):
        place = (0, 0, 0) if name == _CALLED else (1, code, len(text))
        table += struct.pack("<IBBHQQ", names.index(b"\0" + name + b"\0") + 1, _GLOBAL_FUNCTION, 0, *place)
    entries = (
        *(_GNU_HASH, hashes, _STRTAB, strings, _STRSZ, len(names), _SYMTAB, symbols, _SYMENT, _SYMBOL),
        *(_RELA, relocations, _RELASZ, _RELOCATION, _RELAENT, _RELOCATION, _NULL, 0),
    )
    library = bytearray(address - _PAGE + 8)
    for offset, data in (
        (0, struct.pack("<16sHHIQQQI6H", b"\x7fELF\2\1\1", _SHARED, _X86_64, 1, 0, _HEADER, 0, 0, 64, 56, 4, 0, 0, 0)),
        (_HEADER + 0 * _SEGMENT, _segment(_LOAD, _READ_EXECUTE, 0, 0, dynamic)),
        (_HEADER + 1 * _SEGMENT, _segment(_LOAD, _READ_WRITE, dynamic, _PAGE, len(library) - dynamic)),
        (_HEADER + 2 * _SEGMENT, _segment(_DYNAMIC, _READ_WRITE, dynamic, _PAGE, 9 * _ENTRY)),
        # Without it the linker would make the stack executable.
        (_HEADER + 3 * _SEGMENT, _segment(_STACK, _READ_WRITE, 0, 0, 0)),
        (symbols, table),
        (strings, names),
        (hashes, _hash_table(2, _CALLERS)),
        (relocations, struct.pack("<QQq", address, 1 << 32 | _ADDRESS_OF, 0)),
        (code, text),
        (dynamic, struct.pack("<18Q", *entries)),
    ):
        library[offset : offset + len(data)] = data
    return bytes(library)


def _hash_table(first: int, names: Sequence[bytes]) -> bytes:
    """Return a table of one bucket for the symbols from the number *first* on.

    It is asked for each symbol of QEMU and its libraries. A table of the older kind has no filter, and all of them took a millisecond.
    """
    filtered, chain = 0, list[int]()
    for name in names:
        value = functools.reduce(lambda value, character: (value * 33 + character) & 0xFFFFFFFF, name, 5381)
        filtered |= 1 << value % 64 | 1 << (value >> 6) % 64
        chain.append(value & ~1)
    chain[-1] |= 1
    return struct.pack(f"<4IQI{len(chain)}I", 1, first, 1, 6, filtered, first, *chain)


def _segment(kind: int, flags: int, offset: int, up: int, size: int) -> bytes:
    return struct.pack("<II6Q", kind, flags, offset, up + offset, up + offset, size, size, _PAGE)


def _align(offset: int) -> int:
    return -(-offset // 16) * 16


def lend_library(inherited: InheritedFds) -> dict[str, str]:
    """Lend the library to a child process, and return what its environment has to have for it."""
    fd = inherited.add(os.memfd_create("read-only-open", os.MFD_CLOEXEC))
    os.write(fd, make_library())
    return {_PRELOAD: f"/proc/self/fd/{fd}"}


#: Found once and for all, for each user and QEMU.
_proved: dict[tuple[int, str], bool] = {}


async def prove_library(prefix: Sequence[str], program: str, *, environment: Mapping[str, str]) -> bool:
    """Find out whether a program is started with the library here; some 10 ms the first time. It is not run.

    Args:
      prefix: What confines it, as a command.
      program: QEMU.
      environment: `Runtime.environment`.

    """
    await trio.lowlevel.checkpoint()
    kind = os.geteuid(), program
    if kind not in _proved:
        with InheritedFds() as inherited:
            lent = lend_library(inherited)
            process = await run_owned(
                [*prefix, "/bin/sh", "-c", _LIST, "sh", program, "--version"],
                environment={**minimal_environment(), **environment, **lent},
                inherited=inherited,
            )
        _proved[kind] = any(line.split()[:1] == [lent[_PRELOAD]] for line in process.output().splitlines())
    return _proved[kind]
