// SPDX-License-Identifier: Apache-2.0
#include "posix_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace layerwise {

namespace {

// Opens the file, or creates it with exactly this mode.
Status OpenOrCreate(const Place& place, const std::string& path, uint32_t mode, Descriptor* fd) {
  for (;;) {
    *fd = Descriptor(openat(place.dir(), place.name(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_CREAT | O_EXCL, mode));
    if (fd->valid()) {
      return fchmod(fd->get(), mode) == 0 ? Status::Ok() : PosixError("fchmod", path);
    }
    if (errno != EEXIST) return PosixError("create", path);
    struct stat info;
    Status status = OpenRegular("lock", place, path, O_RDWR, fd, &info);
    if (status.error_number() != ENOENT) return status;
  }
}

}  // namespace

Status PosixFileLock::Acquire(Roots& roots, const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) {
  Place place;
  Descriptor fd;
  Status status = roots.Find("lock", path, Links::kRefused, &place);
  if (status.ok()) status = OpenOrCreate(place, path, mode, &fd);
  if (!status.ok()) return status;
  struct flock whole = {};
  whole.l_type = F_WRLCK;
  whole.l_whence = SEEK_SET;
  if (fcntl(fd.get(), F_OFD_SETLK, &whole) != 0) {
    return Status::IoError(errno == EACCES ? EAGAIN : errno, "lock", path);
  }
  *lock = std::make_unique<PosixFileLock>(roots, path, std::move(fd));
  return Status::Ok();
}

Status PosixFileLock::Hold(Roots& roots, const std::string& path, bool alone, std::unique_ptr<FileLock>* lock) {
  Place place;
  Descriptor fd;
  struct stat held, there;
  Status status = roots.Find("hold", path, Links::kFollowed, &place);
  if (!status.ok()) return status;
  // Over NFS an exclusive lock takes a file that is open for writing, a shared one a file that is open for reading.
  status = OpenRegular("hold", place, path, alone ? O_RDWR : O_RDONLY, &fd, &held);
  if (alone && (status.error_number() == EACCES || status.error_number() == EROFS)) {
    status = OpenRegular("hold", place, path, O_RDONLY, &fd, &held);
  }
  if (!status.ok()) return status;
  if (flock(fd.get(), (alone ? LOCK_EX : LOCK_SH) | LOCK_NB) != 0) return PosixError("hold", path);
  // Whoever removes it did so while holding it alone: it may be gone since it was opened.
  if (fstatat(place.dir(), place.name(), &there, AT_SYMLINK_NOFOLLOW) != 0) return PosixError("hold", path);
  if (held.st_dev != there.st_dev || held.st_ino != there.st_ino) return Status::IoError(ENOENT, "hold", path);
  *lock = std::make_unique<PosixFileLock>(roots, path, std::move(fd));
  return Status::Ok();
}

Status PosixFileLock::Write(std::string_view data) {
  Status status = WriteAll(fd_.get(), data.data(), data.size(), 0, path_);
  if (!status.ok()) return status;
  if (ftruncate(fd_.get(), static_cast<off_t>(data.size())) != 0) return PosixError("ftruncate", path_);
  if (fdatasync(fd_.get()) != 0) return PosixError("fdatasync", path_);
  return Status::Ok();
}

Status PosixFileLock::Read(uint64_t cap, std::string* data) {
  data->clear();
  struct stat info;
  if (fstat(fd_.get(), &info) != 0) return PosixError("fstat", path_);
  if (static_cast<uint64_t>(info.st_size) > cap) return Status::IoError(EFBIG, "read", path_);
  data->resize(static_cast<size_t>(info.st_size));
  size_t got = 0;
  Status status = ReadAll(fd_.get(), data->data(), data->size(), 0, 1, path_, &got);
  data->resize(got);
  return status;
}

Status PosixFileLock::HeldPathIsMine(bool* mine) {
  *mine = false;
  if (!fd_.valid()) return Status::Ok();
  Place place;
  Status status = roots_.Find("lstat", path_, Links::kRefused, &place);
  const int why = status.error_number();
  if (why == ENOENT || why == ENOTDIR || why == ELOOP || why == ESTALE) return Status::Ok();  // another directory's
  if (!status.ok()) return status;
  struct stat held, there;
  if (fstat(fd_.get(), &held) != 0) return PosixError("fstat", path_);
  if (fstatat(place.dir(), place.name(), &there, AT_SYMLINK_NOFOLLOW) != 0) {
    return errno == ENOENT || errno == ENOTDIR ? Status::Ok() : PosixError("lstat", path_);
  }
  *mine = held.st_dev == there.st_dev && held.st_ino == there.st_ino;
  return Status::Ok();
}

}  // namespace layerwise
