// SPDX-License-Identifier: Apache-2.0
#include "posix_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/stat.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <system_error>
#include <thread>
#include <utility>

#include "layerwise/aligned_buffer.h"
#include "pieces.h"

namespace layerwise {

namespace {

// Linux moves at most 2 GiB less a page a call; this stays aligned when it is cut.
constexpr size_t kLargestIo = 1 << 30;

// A thread of this process that is not its first; 0 if none is found.
pid_t OtherThread() {
  if (gettid() != getpid()) return gettid();
  pid_t found = 0;
  if (DIR* const tasks = opendir("/proc/self/task")) {
    while (const dirent* const task = found == 0 ? readdir(tasks) : nullptr) {
      const pid_t thread = static_cast<pid_t>(std::strtol(task->d_name, nullptr, 10));  // 0 for "." and ".."
      if (thread != getpid()) found = thread;
    }
    closedir(tasks);
  }
  return found;
}

// Whoever opens a leased file makes the kernel send SIGIO to the lease's owner, and that
// ends a process which has no handler. So the owner becomes a process group of a number
// that no group has, since it is a thread's: the kernel then finds nobody to signal,
// whatever the process does with its signals.
bool OwnedByNobody(int fd) {
  const auto own = [fd](pid_t thread) {
    const f_owner_ex nobody = {F_OWNER_PGRP, thread};
    return fcntl(fd, F_SETOWN_EX, &nobody) == 0;
  };
  const pid_t other = OtherThread();
  if (other != 0 && own(other)) return true;
  bool owned = false;  // there is none, or it has just ended
  try {
    std::thread([&] { owned = own(gettid()); }).join();
  } catch (const std::system_error&) {
  }
  return owned;
}

Status LeaseSilently(int fd, const std::string& path) {
  if (!OwnedByNobody(fd)) return Status::IoError(EOPNOTSUPP, "lease without a signal", path);
  if (fcntl(fd, F_SETLEASE, F_WRLCK) == 0) return Status::Ok();
  const bool unknown = errno == EINVAL || errno == ENOSYS || errno == ENOLCK;
  if (errno == EAGAIN) return Status::IoError(EBUSY, "reuse a file that is open elsewhere", path);
  return Status::IoError(unknown ? EOPNOTSUPP : errno, "lease", path);
}

// EBUSY unless this descriptor is the only way to the file.
Status CheckSoleUser(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0) return PosixError("fstat", path);
  Status status = CheckRegular("reuse", path, info);
  if (!status.ok()) return status;
  if (info.st_nlink != 1) return Status::IoError(EBUSY, "reuse a file with several names", path);
  // The kernel grants this lease only while nobody else has the file open or mapped.
  status = LeaseSilently(fd, path);
  if (!status.ok()) return status;
  const bool opened_since = fcntl(fd, F_GETLEASE) != F_WRLCK;  // by somebody who now waits for us
  if (fcntl(fd, F_SETLEASE, F_UNLCK) != 0) return PosixError("give back the lease of", path);
  return opened_since ? Status::IoError(EBUSY, "reuse a file that is being opened elsewhere", path) : status;
}

std::string ProbeName() {
  std::random_device random;
  const uint64_t bits = (static_cast<uint64_t>(random()) << 32) | random();
  char name[64];
  std::snprintf(name, sizeof(name), ".probe-%d-%016" PRIx64, static_cast<int>(getpid()), bits);
  return name;
}

// Whether an open directory has no entry; false if that can't be told.
bool IsEmpty(const Descriptor& dir) {
  const int fd = openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const stream = fd < 0 ? nullptr : fdopendir(fd);
  if (stream == nullptr) {
    if (fd >= 0) close(fd);
    return false;
  }
  bool empty = true;
  errno = 0;
  while (const dirent* const entry = readdir(stream)) {
    empty = empty && (std::strcmp(entry->d_name, ".") == 0 || std::strcmp(entry->d_name, "..") == 0);
  }
  empty = empty && errno == 0;
  closedir(stream);
  return empty;
}

// A server of FUSE refuses O_DIRECT in an open: fcntl turns it on without asking.
bool ServerRefusesDirect(int fd) {
  struct statfs info;
  if (fstatfs(fd, &info) != 0 || static_cast<uint32_t>(info.f_type) != FUSE_SUPER_MAGIC) return false;
  // Without O_NONBLOCK, opening a leased file would wait.
  const std::string same = "/proc/self/fd/" + std::to_string(fd);
  const Descriptor again(open(same.c_str(), O_RDONLY | O_DIRECT | O_NONBLOCK | O_CLOEXEC));
  return !again.valid() && errno == EINVAL;
}

}  // namespace

Status PosixError(const char* operation, const std::string& path) {
  return Status::IoError(errno, operation, path);
}

bool FitsKernel(size_t n, uint64_t offset) {
  return offset <= static_cast<uint64_t>(INT64_MAX) && n <= static_cast<uint64_t>(INT64_MAX) - offset;
}

Status CreateExclusive(const Place& place, const std::string& path, uint32_t mode, Descriptor* fd) {
  *fd = Descriptor(openat(place.dir(), place.name(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode));
  if (!fd->valid()) return PosixError("create", path);
  if (fchmod(fd->get(), mode) == 0) return Status::Ok();
  Status status = PosixError("fchmod", path);
  unlinkat(place.dir(), place.name(), 0);
  return status;
}

Status OpenRegular(const char* operation, const Place& place, const std::string& path, int flags, Descriptor* fd,
                   struct stat* info) {
  Status status = CheckRegular(operation, path, place);
  if (!status.ok()) return status;
  // It may be another thing by now: without O_NONBLOCK, opening a pipe would wait for its writer.
  *fd = Descriptor(openat(place.dir(), place.name(), flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!fd->valid()) return PosixError(operation, path);
  if (fstat(fd->get(), info) != 0) return PosixError("fstat", path);
  return CheckRegular(operation, path, *info);
}

Status MakeExactly(const Place& place, const std::string& path, uint32_t mode, Descriptor* made) {
  if (mkdirat(place.dir(), place.name(), mode) != 0) return PosixError("make directory", path);
  *made = Descriptor(openat(place.dir(), place.name(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  struct stat info;
  if (!made->valid() || fstat(made->get(), &info) != 0) return PosixError("open the directory just made", path);
  const uint32_t found = info.st_mode & 07777;
  if (found == mode) return Status::Ok();
  // More rights than it was made with are the file system's (SMB, FUSE, inherited ACLs), or those of another directory
  // that somebody has put there since. An empty one loses nothing by our mode.
  if ((found & 0777 & ~mode) != 0 && !IsEmpty(*made)) {
    return Status::IoError(ESTALE, "make directory: another one is there already instead", path);
  }
  // Through the descriptor, which need not be readable: its umask may have taken that.
  if (chmod(("/proc/self/fd/" + std::to_string(made->get())).c_str(), mode) == 0) return Status::Ok();
  Status status = PosixError("chmod", path);
  unlinkat(place.dir(), place.name(), AT_REMOVEDIR);
  return status;
}

Status CreateProbe(Roots& roots, const std::string& dir, std::string* path, Descriptor* fd,
                   std::optional<DirectIoAlignment>* direct) {
  const std::string name = ProbeName();
  *path = dir + "/" + name;
  Place place;
  Status status = roots.Find("create", *path, Links::kRefused, &place);
  if (status.ok()) status = CreateExclusive(place, *path, 0600, fd);
  if (!status.ok()) return status;
  const std::optional<DirectIoAlignment> found = direct != nullptr ? TurnDirect(fd->get()) : std::nullopt;
  if (unlinkat(place.dir(), place.name(), 0) != 0) return PosixError("unlink", *path);
  if (direct != nullptr) *direct = found;
  return status;
}

Status TakeOver(Roots& roots, const std::string& from, const std::string& to, uint32_t mode, Descriptor* fd) {
  Place old, taken;
  Status status = roots.Find("reuse", from, Links::kRefused, &old);
  if (status.ok()) status = roots.Find("reuse", to, Links::kRefused, &taken);
  if (status.ok()) status = CheckRegular("reuse", from, old);
  if (!status.ok()) return status;
  if (renameat2(old.dir(), old.name(), taken.dir(), taken.name(), RENAME_NOREPLACE) != 0) {
    const bool unknown = errno == EINVAL || errno == ENOSYS;
    return Status::IoError(unknown ? EOPNOTSUPP : errno, "rename to " + to, from);
  }
  // Without O_NONBLOCK, opening a pipe or a leased file would wait.
  *fd = Descriptor(openat(taken.dir(), taken.name(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!fd->valid()) {
    return errno == EWOULDBLOCK ? Status::IoError(EBUSY, "open a file that is leased elsewhere", to)
                                : PosixError("open", to);
  }
  status = CheckSoleUser(fd->get(), to);
  if (!status.ok()) return status;
  if (fcntl(fd->get(), F_SETFL, 0) != 0) return PosixError("fcntl", to);
  return fchmod(fd->get(), mode) == 0 ? Status::Ok() : PosixError("fchmod", to);
}

std::optional<DirectIoAlignment> TurnDirect(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return std::nullopt;
  DirectIoAlignment alignment{kAlign, kAlign};
  struct statx info = {};
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0) {
    alignment = {info.stx_dio_mem_align, info.stx_dio_offset_align};
    const bool usable = alignment.memory > 0 && alignment.memory <= kAlign && alignment.offset > 0 &&
                        alignment.offset <= kAlign;
    if (!usable) return std::nullopt;
  }
  if (ServerRefusesDirect(fd)) return std::nullopt;
  if (fcntl(fd, F_SETFL, flags | O_DIRECT) != 0) return std::nullopt;
  return alignment;
}

Status WriteAll(int fd, const void* data, size_t n, uint64_t offset, const std::string& path) {
  if (!FitsKernel(n, offset)) return Status::IoError(EFBIG, "pwrite", path);
  const char* next = static_cast<const char*>(data);
  while (n > 0) {
    const ssize_t done = pwrite(fd, next, std::min(n, kLargestIo), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return PosixError("pwrite", path);
    }
    if (done == 0) return Status::IoError(EIO, "pwrite made no progress", path);
    next += done;
    n -= static_cast<size_t>(done);
    offset += static_cast<uint64_t>(done);
  }
  return Status::Ok();
}

Status TruncateTo(int fd, uint64_t size, const std::string& path) {
  if (!FitsKernel(size, 0)) return Status::IoError(EFBIG, "ftruncate", path);
  int result;
  do {
    result = ftruncate(fd, static_cast<off_t>(size));
  } while (result != 0 && errno == EINTR);
  return result == 0 ? Status::Ok() : PosixError("ftruncate", path);
}

Status ReadAll(int fd, void* data, size_t n, uint64_t offset, uint32_t align, const std::string& path,
               size_t* got) {
  *got = 0;
  if (!FitsKernel(n, offset)) return Status::IoError(EINVAL, "pread", path);
  char* const begin = static_cast<char*>(data);
  while (*got < n) {
    const ssize_t done =
        pread(fd, begin + *got, std::min(n - *got, kLargestIo), static_cast<off_t>(offset + *got));
    if (done < 0) {
      if (errno == EINTR) continue;
      return PosixError("pread", path);
    }
    *got += static_cast<size_t>(done);
    // Direct I/O stops inside a sector only at the end of the file.
    if (done == 0 || *got % align != 0) break;
  }
  return Status::Ok();
}

Status PosixWritableFile::Pwrite(const void* data, size_t n, uint64_t offset) {
  return WriteAll(fd_.get(), data, n, offset, path_);
}

Status PosixWritableFile::Pwritev(const iovec* pieces, int count, uint64_t offset) {
  Pieces left(pieces, static_cast<size_t>(count));
  if (!FitsKernel(left.bytes(), offset)) return Status::IoError(EFBIG, "pwritev", path_);
  while (!left.empty()) {
    const ssize_t done = pwritev(fd_.get(), left.data(), left.count(), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      return PosixError("pwritev", path_);
    }
    if (done == 0) return Status::IoError(EIO, "pwritev made no progress", path_);
    left.Drop(static_cast<size_t>(done));
    offset += static_cast<uint64_t>(done);
  }
  return Status::Ok();
}

Status PosixWritableFile::Allocate(uint64_t size) {
  if (size == 0) return Status::Ok();
  if (!FitsKernel(size, 0)) return Status::IoError(EFBIG, "fallocate", path_);
  int result;
  do {
    result = fallocate(fd_.get(), 0, 0, static_cast<off_t>(size));
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) return PosixError("fallocate", path_);
  return Status::Ok();
}

Status PosixWritableFile::Truncate(uint64_t size) { return TruncateTo(fd_.get(), size, path_); }

Status PosixWritableFile::Sync() {
  if (poisoned_) return Status::IoError(EIO, "fdatasync after a failed one", path_);
  if (fdatasync(fd_.get()) == 0) return Status::Ok();
  poisoned_ = true;
  return PosixError("fdatasync", path_);
}

Status PosixReadableFile::Pread(void* data, size_t n, uint64_t offset, size_t* got) {
  return ReadAll(fd_.get(), data, n, offset, alignment().offset, path_, got);
}

}  // namespace layerwise
