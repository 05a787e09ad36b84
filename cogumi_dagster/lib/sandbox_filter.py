"""Refuses system calls whose memory no limit of the box counts.

What a program puts into a shared segment or a queue stays when it lets go of it, so that limits on its address space
and files do not bind. The filter is classic BPF over ``struct seccomp_data`` (Linux's seccomp(2) and
Documentation/userspace-api/seccomp_filter.rst); bubblewrap installs it.
"""

import errno
import os
import platform
import struct

_MACHINES = {
    "x86_64": (0xC000003E, {"shmget": 29, "semget": 64, "msgget": 68, "memfd_create": 319, "memfd_secret": 447}),
    "aarch64": (0xC00000B7, {"shmget": 194, "semget": 190, "msgget": 186, "memfd_create": 279, "memfd_secret": 447}),
}
"""By machine: what the kernel calls it (AUDIT_ARCH of linux/audit.h), and the numbers of the calls that are refused."""
_OTHER_NUMBERS = 0x40000000
"""From here on the numbers are x32's: the same calls again."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM


def system_calls() -> bytes | None:
    """The filter as bubblewrap reads it; None on a machine whose numbers are not known here."""
    if platform.machine() not in _MACHINES:
        return None
    machine, refused = _MACHINES[platform.machine()]
    left = len(refused)
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, left + 3, machine),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, left + 1, 0, _OTHER_NUMBERS),
    ]
    steps += [(_EQUAL, left - at, 0, number) for at, number in enumerate(refused.values())]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def as_pipe(content: bytes) -> int:
    """A descriptor from which ``content`` (less than a pipe holds) can be read once."""
    readable, writable = os.pipe()
    with os.fdopen(writable, "wb") as pipe:
        pipe.write(content)
    return readable
