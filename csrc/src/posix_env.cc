// SPDX-License-Identifier: Apache-2.0
#include "layerwise/posix_env.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "posix_file.h"
#include "posix_lock.h"
#include "roots.h"

namespace layerwise {

PosixEnv::PosixEnv() : roots_(std::make_unique<Roots>()) {}

PosixEnv::~PosixEnv() = default;

void PosixEnv::Confine(const std::string& root) { roots_->Add(root); }

void PosixEnv::LetGo() { roots_->LetGo(); }

Status PosixEnv::MakeDir(const std::string& path, uint32_t mode) {
  Place place;
  Descriptor made;
  Status status = roots_->Find("make directory", path, Links::kRefused, &place);
  if (status.ok()) status = MakeExactly(place, path, mode, &made);
  return status.ok() ? roots_->Pin(path, made) : status;
}

Status PosixEnv::NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                                 std::unique_ptr<WritableFile>* file) {
  Place place;
  Descriptor fd;
  Status status = roots_->Find("create", path, Links::kRefused, &place);
  if (status.ok()) status = CreateExclusive(place, path, mode, &fd);
  if (!status.ok()) return status;
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  *file = std::make_unique<PosixWritableFile>(path, std::move(fd), alignment);
  return Status::Ok();
}

Status PosixEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                           std::unique_ptr<WritableFile>* file) {
  Descriptor fd;
  Status status = TakeOver(*roots_, from, to, mode, &fd);
  if (!status.ok()) return status;
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  *file = std::make_unique<PosixWritableFile>(to, std::move(fd), alignment);
  return Status::Ok();
}

Status PosixEnv::NewReadableFile(const std::string& path, bool direct,
                                 std::unique_ptr<ReadableFile>* file) {
  Place place;
  Descriptor fd;
  struct stat info;
  Status status = roots_->Find("open", path, Links::kFollowed, &place);
  if (status.ok()) status = OpenRegular("open", place, path, O_RDONLY, &fd, &info);
  if (!status.ok()) return status;
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  // Shards are read from their start to their end, by several threads.
  if (!alignment) static_cast<void>(posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL));
  *file = std::make_unique<PosixReadableFile>(path, std::move(fd), static_cast<uint64_t>(info.st_size), alignment);
  return Status::Ok();
}

Status PosixEnv::Rename(const std::string& from, const std::string& to) {
  const std::string operation = "rename to " + to;
  Place old, replaced;
  Status status = roots_->Find(operation.c_str(), from, Links::kRefused, &old);
  if (status.ok()) status = roots_->Find("rename", to, Links::kRefused, &replaced);
  if (!status.ok()) return status;
  status = CheckRegular("rename", to, replaced);
  if (!status.ok() && status.error_number() != ENOENT) return status;
  if (renameat(old.dir(), old.name(), replaced.dir(), replaced.name()) == 0) return Status::Ok();
  return PosixError(operation.c_str(), from);
}

Status PosixEnv::SyncDir(const std::string& path) {
  Descriptor dir;
  Status status = roots_->FindDir("open directory", path, Links::kFollowed, &dir);
  if (!status.ok()) return status;
  Descriptor fd(openat(dir.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return PosixError("open directory", path);
  if (fsync(fd.get()) != 0) return PosixError("fsync directory", path);
  return fd.Close(path);
}

Status PosixEnv::Unlink(const std::string& path) {
  Place place;
  Status status = roots_->Find("unlink", path, Links::kRefused, &place);
  if (status.ok()) status = CheckRegular("unlink", path, place);
  if (!status.ok()) return status;
  return unlinkat(place.dir(), place.name(), 0) == 0 ? Status::Ok() : PosixError("unlink", path);
}

Status PosixEnv::RemoveDir(const std::string& path) {
  Place place;
  Status status = roots_->Find("remove directory", path, Links::kRefused, &place);
  if (!status.ok()) return status;
  return unlinkat(place.dir(), place.name(), AT_REMOVEDIR) == 0 ? Status::Ok() : PosixError("remove directory", path);
}

Status PosixEnv::ListDir(const std::string& path, std::vector<std::string>* names) {
  names->clear();
  Descriptor there;
  Status status = roots_->FindDir("open directory", path, Links::kFollowed, &there);
  if (!status.ok()) return status;
  const int fd = openat(there.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* const dir = fd < 0 ? nullptr : fdopendir(fd);
  if (dir == nullptr) {
    status = PosixError("open directory", path);
    if (fd >= 0) close(fd);
    return status;
  }
  for (;;) {
    errno = 0;
    const dirent* const entry = readdir(dir);
    if (entry == nullptr) {
      if (errno != 0) status = PosixError("read directory", path);
      break;
    }
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names->push_back(name);
  }
  closedir(dir);
  std::sort(names->begin(), names->end());
  return status;
}

Status PosixEnv::Stat(const std::string& path, FileInfo* info) {
  Place place;
  Status status = roots_->Find("lstat", path, Links::kFollowed, &place);
  if (!status.ok()) return status;
  struct stat found;
  if (fstatat(place.dir(), place.name(), &found, AT_SYMLINK_NOFOLLOW) != 0) return PosixError("lstat", path);
  info->size = static_cast<uint64_t>(found.st_size);
  if (S_ISREG(found.st_mode)) {
    info->kind = FileKind::kFile;
  } else if (S_ISDIR(found.st_mode)) {
    info->kind = FileKind::kDirectory;
  } else if (S_ISLNK(found.st_mode)) {
    info->kind = FileKind::kLink;
  } else {
    info->kind = FileKind::kOther;
  }
  return Status::Ok();
}

Status PosixEnv::Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) {
  return PosixFileLock::Acquire(*roots_, path, mode, lock);
}

Status PosixEnv::Hold(const std::string& path, bool alone, std::unique_ptr<FileLock>* lock) {
  return PosixFileLock::Hold(*roots_, path, alone, lock);
}

Status PosixEnv::DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) {
  std::string path;
  Descriptor fd;
  const Status status = CreateProbe(*roots_, dir, &path, &fd, alignment);
  return status.ok() ? fd.Close(path) : status;
}

Status PosixEnv::FileSystem(const std::string& path, uint64_t* type) {
  Descriptor dir;
  Status status = roots_->FindDir("statfs", path, Links::kFollowed, &dir);
  if (!status.ok()) return status;
  struct statfs info;
  if (fstatfs(dir.get(), &info) != 0) return PosixError("statfs", path);
  *type = static_cast<uint32_t>(info.f_type);
  return Status::Ok();
}

}  // namespace layerwise
