"""A filter of system calls for sandboxed programs: what they never need and holes in kernels are found behind.

bubblewrap loads it after it has made the sandbox. It refuses namespaces of one's own, mounts, tracing, keys, BPF,
io_uring, and SysV shared memory and queues, whose pages no limit of a process counts. Programs see "not permitted".
Other architectures than the two below have no filter; namespaces and limits hold there all the same.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

_ALLOW, _KILL, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # the last two: EPERM, ENOSYS
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data
_NAMESPACES = 0x7E020000  # of clone's flags: CLONE_NEW*
_CLONE3 = 435  # takes its flags by pointer, so C libraries are told to use clone
_X32 = 0x40000000  # the bit of x86-64's second numbering


class _Calls(NamedTuple):
    architecture: int  # AUDIT_ARCH_*
    clone: int
    refused: tuple[int, ...]


# io_uring, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr: numbers are the same everywhere
_NEW = (*range(425, 434), 442)
_CALLS = {
    # shmget, msgget, semget, ptrace, personality, modify_ldt, pivot_root, chroot, mount, umount2, mq_open, add_key,
    # request_key, keyctl, unshare, perf_event_open, *_handle_at, setns, process_vm_*, bpf, userfaultfd
    "x86_64": _Calls(
        0xC000003E,
        56,
        (
            29,
            68,
            64,
            101,
            135,
            154,
            155,
            161,
            165,
            166,
            240,
            248,
            249,
            250,
            272,
            298,
            303,
            304,
            308,
            310,
            311,
            321,
            323,
            *_NEW,
        ),
    ),
    "aarch64": _Calls(
        0xC00000B7,
        220,
        (194, 186, 190, 117, 92, 41, 51, 40, 39, 180, 217, 218, 219, 97, 241, 264, 265, 268, 270, 271, 280, 282, *_NEW),
    ),
}


def program(machine: str | None = None) -> bytes | None:
    """The filter as an array of sock_filter, or None for an architecture without one."""
    calls = _CALLS.get(machine or platform.machine())
    return None if calls is None else b"".join(struct.pack("HBBI", *line) for line in _lines(calls))


def _lines(calls: _Calls) -> Iterator[tuple[int, int, int, int]]:
    """The program, one instruction a line: operation, instructions to skip if true and if false, operand."""
    # Another architecture numbers its calls differently: kill.
    yield _LOAD, 0, 0, _ARCHITECTURE
    yield _EQUAL, 1, 0, calls.architecture
    yield _RETURN, 0, 0, _KILL
    # So does x86-64's second numbering (x32): kill.
    yield _LOAD, 0, 0, _NUMBER
    yield _AT_LEAST, 0, 1, _X32
    yield _RETURN, 0, 0, _KILL
    # clone3: "no such call", so that C libraries fall back to clone.
    yield _EQUAL, 0, 1, _CLONE3
    yield _RETURN, 0, 0, _UNKNOWN
    # The list: "not permitted".
    for number in calls.refused:
        yield _EQUAL, 0, 1, number
        yield _RETURN, 0, 0, _REFUSE
    # Everything but clone is allowed, and clone too unless its flags make a namespace.
    yield _EQUAL, 1, 0, calls.clone
    yield _RETURN, 0, 0, _ALLOW
    yield _LOAD, 0, 0, _FIRST_ARGUMENT
    yield _ANY_BIT, 0, 1, _NAMESPACES
    yield _RETURN, 0, 0, _REFUSE
    yield _RETURN, 0, 0, _ALLOW
