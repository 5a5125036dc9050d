# SPDX-License-Identifier: Apache-2.0
"""A real seccomp filter, as source that a child process runs first."""

# io_uring_setup (425) is EPERM from here on; all else is allowed.
FORBID_URING = """
import ctypes, struct
def op(code, yes, no, value): return struct.pack("HBBI", code, yes, no, value)
code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, 425) + op(0x06, 0, 0, 0x00050001) + op(0x06, 0, 0, 0x7FFF0000)
memory = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(memory)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""
