# SPDX-License-Identifier: Apache-2.0
"""The native core: files, shards and hashes (contracts: csrc/include/layerwise).

Every call that touches a file raises OSError(errno, message, filename), as the subclass that fits the errno, and
releases the GIL. A wrong value is a ValueError, a call in the wrong state a RuntimeError. Buffers are contiguous
objects with the buffer protocol; addresses, offsets and lengths are in bytes.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

from typing_extensions import Buffer

_Path = str | PathLike[str]

def xxh3_64(buffer: Buffer) -> int: ...
def hash_memory(address: int, nbytes: int) -> int: ...
def make_huge(address: int, nbytes: int) -> int:
    """Asks for huge pages under memory; returns the bytes that have them. OSError(EINVAL) where the kernel cannot."""

def hear_signal(number: int, bell: int) -> None:
    """From now on each signal `number` adds 1 to the eventfd `bell`, wherever the process's threads are; then the
    handler that was there runs, but not the default action. Again: in front of what was installed since. RuntimeError
    for another signal, or too many bells.
    """

def stop_hearing(bell: int) -> None: ...
def forget_dead_children() -> None:
    """SIGCHLD is handled as by default, not at all. From any thread."""

def outlive_signal(number: int) -> None:
    """In a child: the signal ends it only if its parent sent it or is dead. Else it dies with its parent."""

def hash_name() -> str:
    """The instruction set that hashes: avx512, avx2, sse2 or scalar."""

def calls_under_way() -> list[tuple[str, str, float]]:
    """(operation, path, seconds) of each call to the operating system that has not returned; the longest first."""

def other_objects(
    mappings: list[Mapping[Any, Any]], sizes: list[int], names: list[Any], values: list[Any]
) -> list[tuple[int, Any]] | None:
    """Whether mappings hold what they did: `sizes` entries each, with these names and the very same values, in order.

    Returns (place in `values`, the object there now) of each that is another one; None if there are other names. Names
    are equal if they are the same object or equal strings.
    """

def keep_forever(object: object) -> None:
    """Never frees what this refers to, not at the interpreter's exit either."""

class TensorWords:
    """Reads words of tensors where torch keeps them, in bytes from the beginning of what each is part of.

    `kind` is the class that all tensors are of. `impl`, in the Python object, leads to torch's own tensor, which has
    the rest: `counter` leads to the version, at `version`; `storage` to the storage, which has the memory's address at
    `address`; the word at `references` counts who holds it, and the first `inside` bytes have all that says where its
    elements are. REQUIRES: that all of this is so. ValueError for more than 256 bytes inside.
    """

    def __init__(
        self, kind: type, *, impl: int, counter: int, version: int, storage: int, address: int, references: int,
        inside: int,
    ) -> None: ...  # fmt: skip
    def versions(self, tensors: list[Any]) -> bytes | None:
        """Of each a word of 8 bytes. None if one is no tensor, or has none."""
    def insides(self, tensors: list[Any]) -> bytes | None:
        """Of each the first bytes of torch's own tensor; in place of `references` stands where the storage has its
        memory. None if one is no tensor, or has no storage.
        """
    def have_insides(self, tensors: list[Any], known: bytes) -> bool:
        """Whether `insides` would return what is known."""

class Hashing:
    """XXH3-64 of pieces of memory, (address, bytes) each, made on another thread meanwhile
    (csrc/include/layerwise/hash_job.h). ValueError if one is not mapped.

    The memory must stay mapped until this is collected; until then it holds `keeping`.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]], keeping: object = None) -> None: ...
    def hashes(self) -> list[int]:
        """Of each piece, once all are made. Helps with what is left. The memory must not change until this returns."""

class Env:
    """The way to the operating system. Any thread may call any method."""

    def confine(self, root: _Path) -> None:
        """From now on nothing is made, written or removed through a symbolic link below `root` (ELOOP), and a root
        that is another directory than at first is ESTALE (csrc/include/layerwise/env.h).
        """

    def let_go(self) -> None:
        """Closes the roots; the next call opens them again."""

    def make_dir(self, path: _Path, mode: int = 0o700) -> None: ...
    def create(self, path: _Path, mode: int = 0o600, direct: bool = False) -> WritableFile: ...
    def reuse(self, src: _Path, dst: _Path, mode: int = 0o600, direct: bool = False) -> WritableFile:
        """Renames a retired file to `dst` and opens it with its old content.

        FileExistsError if `dst` exists; after any other error unlink `dst`, which may be missing. EBUSY if another
        name or anyone else has the file, EOPNOTSUPP where the file system cannot tell.
        """

    def open(self, path: _Path, direct: bool = False) -> ReadableFile: ...
    def rename(self, src: _Path, dst: _Path) -> None: ...
    def sync_dir(self, path: _Path) -> None: ...
    def unlink(self, path: _Path) -> None:
        """A regular file; what is a link (ELOOP), a folder (EISDIR) or else (EINVAL) stays."""

    def remove_dir(self, path: _Path) -> None: ...
    def list_dir(self, path: _Path) -> list[str]: ...
    def stat(self, path: _Path) -> tuple[str, int]:
        """("file" | "dir" | "link" | "other", size); does not follow a link."""

    def write_file(self, path: _Path, data: Buffer, mode: int = 0o600) -> None: ...
    def read_file(self, path: _Path, cap: int) -> bytes: ...
    def lock(self, path: _Path, mode: int = 0o600) -> FileLock: ...
    def hold(self, path: _Path, alone: bool = False) -> FileLock:
        """Locks a file that is there, alone or with others who read it (csrc/include/layerwise/env.h).

        BlockingIOError while it can't be had; EOPNOTSUPP, ENOSYS or ENOLCK where there are no such locks.
        """

    def file_system(self, path: _Path) -> int:
        """The f_type of statfs(2); 0 if there is none."""

    def direct_io(self, path: _Path) -> tuple[int, int] | None:
        """(alignment of memory, of offsets and lengths) in this directory; None where direct I/O is refused."""

class PosixEnv(Env):
    def __init__(self) -> None: ...

class MockEnv(Env):
    """Touches no disk: keeps names and records, and counts what of shards would be written
    (csrc/include/layerwise/mock_env.h).
    """

    def __init__(self) -> None: ...
    @property
    def files(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def syncs(self) -> int: ...

class NvmEnv(PosixEnv):
    """Direct files are mappings of persistent memory (csrc/include/layerwise/nvm_env.h)."""

    def __init__(self) -> None: ...
    def probe(self, path: _Path) -> None:
        """Raises OSError (EOPNOTSUPP, "no DAX here") unless files in this directory can be mapped with MAP_SYNC."""

class WritableFile:
    @property
    def direct(self) -> bool: ...
    @property
    def memory_align(self) -> int: ...
    @property
    def offset_align(self) -> int: ...
    def pwrite(self, data: Buffer, offset: int) -> None: ...
    def allocate(self, size: int) -> None: ...
    def truncate(self, size: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...

class ReadableFile:
    @property
    def size(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def memory_align(self) -> int: ...
    @property
    def offset_align(self) -> int: ...
    def pread(self, n: int, offset: int) -> bytes: ...
    def close(self) -> None: ...

class FileLock:
    def release(self) -> None: ...
    def write(self, data: Buffer) -> None: ...
    def read(self, cap: int) -> bytes: ...
    def held_path_is_mine(self) -> bool: ...

class BufferPool:
    """A bounded pool of host memory, aligned to 4096 bytes (and a rule: csrc/include/layerwise/buffer_pool.h)."""

    def __init__(self, nbytes: int) -> None: ...
    @staticmethod
    def shared(file: int, nbytes: int) -> tuple[BufferPool, int]:
        """One in the memory of the file descriptor `file`, for another process to attach to: (pool, begin), where
        `begin` is for that process's `attached`.
        """

    @staticmethod
    def attached(file: int, begin: int, nbytes: int, wake: int) -> BufferPool:
        """The pool that another process made by `shared`. It acquires nothing; it adopts. `wake` is an eventfd that is
        notified of each buffer that is given back.
        """

    def adopt(self, place: int, nbytes: int) -> PoolBuffer:
        """The buffer that the other process acquired; released here, it is back in the pool there."""

    def take_returned(self) -> list[int]:
        """Places of the buffers that came back from the other process since the last call."""

    def acquire(self, nbytes: int, timeout_s: float) -> PoolBuffer | None:
        """A buffer of exactly nbytes; None if there is no room in time, at once if it could never fit."""

    @property
    def capacity(self) -> int: ...
    @property
    def in_use(self) -> int: ...
    @property
    def peak(self) -> int:
        """The most bytes that were ever in use."""

class PoolBuffer(Buffer):
    """Memory of a BufferPool; writable by the buffer protocol (torch.frombuffer). Back in the pool when collected."""

    @property
    def address(self) -> int: ...
    @property
    def place(self) -> int:
        """Bytes from the beginning of a shared pool."""

    @property
    def nbytes(self) -> int:
        """0 once released."""

    def release(self) -> None:
        """Gives the memory back; nothing may use it any more, tensors made from it included. Idempotent.

        BufferError while a memoryview of it is open.
        """

class MemoryHold:
    """Keeps memory that others own from being freed, until it is collected (csrc/include/layerwise/memory_hold.h).

    owners: (address of the three words of a c10::DataPtr, address of the memory that it owns). RuntimeError if one
    cannot be held; nothing is held then.
    """

    deleter: ClassVar[int]
    """The address of the function that frees held memory: an owner that was held has it."""
    orphans: ClassVar[int]
    """How many things are held that nobody owns any more."""

    def __init__(self, owners: Sequence[tuple[int, int]]) -> None: ...

class WriterPool:
    """Writes and hashes `depth` blocks at once, for all shards. Closed at the interpreter's exit.

    backend: "posix" (`depth` threads) or "uring" (one thread, io_uring; OSError where that is refused). Of `buffers`
    it keeps depth * block_bytes for itself; without it, nothing can be evacuated.
    """

    def __init__(
        self,
        depth: int,
        backend: str = "posix",
        buffers: BufferPool | None = None,
        block_bytes: int = 1 << 20,
        patience_s: float = 1e9,
        reads: str = "direct",
    ) -> None:
        """`patience_s`: how long a read waits for the disk before it is an OSError (ETIMEDOUT).

        reads: "direct" (past the page cache, where the file system allows that), "auto" (out of the page cache where it
        holds most of a file when that is opened; else "direct") or "off" (through the page cache).
        """

    @staticmethod
    def probe_uring() -> OSError | None:
        """Why io_uring is not to be had here; None if it is."""

    @property
    def backend(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def bytes_read(self) -> int:
        """Of sound blocks, by readers."""

    @property
    def bytes_cached(self) -> int:
        """Of these, those of files that "auto" took out of the page cache."""

    def close(self, timeout_s: float = 1e9) -> bool:
        """Cancels what is queued (ECANCELED), waits for what is running, joins. Idempotent. False: threads go on."""

class Plan:
    """Where in a shard the bytes of each tensor go.

    blocks: (file offset, length); segments: (block, offset in block, tensor, offset in tensor, length).
    `tail_offset` is where appended data begins if no block ends after it.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, int]],
        segments: Sequence[tuple[int, int, int, int, int]],
        tensors: int,
        tail_offset: int = 0,
    ) -> None: ...
    @property
    def blocks(self) -> int: ...
    @property
    def tensors(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...

class ShardWriter:
    """Writes one shard. From submit until a block is no longer leased, its memory must stay mapped and unchanged."""

    def __init__(
        self,
        env: Env,
        pool: WriterPool,
        plan: Plan,
        path: _Path,
        mode: int = 0o600,
        direct: bool = True,
        hash: bool = True,
    ) -> None: ...
    @staticmethod
    def order(
        env: Env,
        pool: WriterPool,
        plan: Plan,
        folder: _Path,
        path: _Path,
        folder_mode: int,
        mode: int,
        direct: bool,
        hash: bool,
        reuse: _Path | None = None,
        before: ShardWriter | None = None,
    ) -> ShardWriter:
        """Returns at once: a thread of the pool makes the folder and the file, and blocks that are submitted meanwhile
        wait. With `reuse`, over that retired file, whose header must be blank and flushed; it becomes `path`. `before`
        was aborted, and wrote to the same path.
        """

    def set_address(self, tensor: int, address: int) -> None: ...
    def set_addresses(self, addresses: Sequence[int]) -> None: ...
    def submit(self, first_block: int, count: int) -> None:
        """Queues blocks; does nothing on a poisoned or aborted writer."""

    def submit_buffer(self, first_block: int, count: int, buffer: PoolBuffer) -> None:
        """The same for blocks that lie in the buffer. It is released: back in its pool once they are written."""

    def append(self, data: Buffer) -> int:
        """Queues a copy of data after the last block; returns the number of blocks (0 on a poisoned writer)."""

    def wait(self, timeout_s: float) -> bool:
        """Whether nothing was pending within the time."""

    def wait_leases(self, timeout_s: float) -> bool:
        """Whether no block was leased within the time."""

    def evacuate(self, first_block: int, count: int, timeout_s: float) -> bool:
        """Right before their memory is overwritten: copies blocks that were not started to the pool's buffers as far
        as there is room, and waits for the others. Whether the memory may be overwritten now."""

    @property
    def submitted(self) -> int: ...
    @property
    def completed(self) -> int:
        """Blocks written and hashed; failed and cancelled ones are not among them."""

    @property
    def pending(self) -> int: ...
    @property
    def leased(self) -> int:
        """Of the pending blocks, those whose tensors' memory is still needed."""

    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_copied(self) -> int: ...
    @property
    def bytes_evacuated(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def memory_align(self) -> int: ...
    def error(self) -> OSError | None: ...
    def reuse_refused(self) -> OSError | None:
        """Why the retired file was not taken, and a new one was made."""

    def hashes_hex(self) -> str:
        """16 digits for each block in order; "" with hash=False."""

    def block_hash(self, index: int) -> int | None:
        """None unless the block is complete, and with hash=False."""

    def block_times(self) -> list[tuple[int, int]]:
        """When each block of the plan was started and was over: nanoseconds of time.monotonic_ns(), 0 if not yet."""

    def finish(self, header: Buffer) -> None: ...
    def abort(self, timeout_s: float = 1e9) -> bool:
        """Cancels what is queued and waits for what is running: whether that ended in time."""

class ShardReader:
    def __init__(self, env: Env, pool: WriterPool, path: _Path, direct: bool = True) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def cached(self) -> bool:
        """Whether blocks are taken out of the page cache ("auto"). One that is bad there is read from the disk."""

    def read(self, offset: int, n: int) -> bytes: ...
    def read_blocks(
        self, blocks: Sequence[tuple[int, int, int | None]], segments: Sequence[tuple[int, int, int, int]]
    ) -> list[int]:
        """blocks: (offset, length, hash or None: not compared); segments: (block, offset in block, address, length).

        Returns the bad blocks.
        """

    def close(self) -> None:
        """Closes the file, once reads that are under way are done. Safe to call twice."""
