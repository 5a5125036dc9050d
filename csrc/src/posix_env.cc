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

namespace layerwise {

Status PosixEnv::MakeDir(const std::string& path, uint32_t mode) {
  if (mkdir(path.c_str(), mode) != 0) return PosixError("make directory", path);
  if (chmod(path.c_str(), mode) == 0) return Status::Ok();
  Status status = PosixError("chmod", path);
  rmdir(path.c_str());
  return status;
}

Status PosixEnv::NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                                 std::unique_ptr<WritableFile>* file) {
  Descriptor fd;
  Status status = CreateExclusive(path, mode, &fd);
  if (!status.ok()) return status;
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  *file = std::make_unique<PosixWritableFile>(path, std::move(fd), alignment);
  return Status::Ok();
}

Status PosixEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                           std::unique_ptr<WritableFile>* file) {
  Descriptor fd;
  Status status = TakeOver(from, to, mode, &fd);
  if (!status.ok()) return status;
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  *file = std::make_unique<PosixWritableFile>(to, std::move(fd), alignment);
  return Status::Ok();
}

Status PosixEnv::NewReadableFile(const std::string& path, bool direct,
                                 std::unique_ptr<ReadableFile>* file) {
  // Without O_NONBLOCK, opening a pipe would wait for its writer.
  Descriptor fd(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return PosixError("open", path);
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return PosixError("fstat", path);
  if (S_ISDIR(info.st_mode)) return Status::IoError(EISDIR, "open", path);
  if (!S_ISREG(info.st_mode)) return Status::IoError(EINVAL, "open what is not a regular file", path);
  const auto alignment = direct ? TurnDirect(fd.get()) : std::nullopt;
  *file = std::make_unique<PosixReadableFile>(path, std::move(fd), static_cast<uint64_t>(info.st_size), alignment);
  return Status::Ok();
}

Status PosixEnv::Rename(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) == 0) return Status::Ok();
  return PosixError(("rename to " + to).c_str(), from);
}

Status PosixEnv::SyncDir(const std::string& path) {
  Descriptor fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return PosixError("open directory", path);
  if (fsync(fd.get()) != 0) return PosixError("fsync directory", path);
  return fd.Close(path);
}

Status PosixEnv::Unlink(const std::string& path) {
  return unlink(path.c_str()) == 0 ? Status::Ok() : PosixError("unlink", path);
}

Status PosixEnv::RemoveDir(const std::string& path) {
  return rmdir(path.c_str()) == 0 ? Status::Ok() : PosixError("remove directory", path);
}

Status PosixEnv::ListDir(const std::string& path, std::vector<std::string>* names) {
  names->clear();
  DIR* const dir = opendir(path.c_str());
  if (dir == nullptr) return PosixError("open directory", path);
  Status status;
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
  struct stat found;
  if (lstat(path.c_str(), &found) != 0) return PosixError("lstat", path);
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
  return PosixFileLock::Acquire(path, mode, lock);
}

Status PosixEnv::DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) {
  std::string path;
  Descriptor fd;
  Status status = CreateProbe(dir, &path, &fd);
  if (!status.ok()) return status;
  *alignment = TurnDirect(fd.get());
  return fd.Close(path);
}

Status PosixEnv::FileSystem(const std::string& path, uint64_t* type) {
  struct statfs info;
  if (statfs(path.c_str(), &info) != 0) return PosixError("statfs", path);
  *type = static_cast<uint32_t>(info.f_type);
  return Status::Ok();
}

}  // namespace layerwise
