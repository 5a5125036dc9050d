// SPDX-License-Identifier: Apache-2.0
#include "memory_disk_env.h"

#include <cerrno>
#include <utility>

#include "memory_file.h"

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

DiskOp NameOp(Kind kind, const MemoryDisk::Place& place, uint64_t inode) {
  DiskOp op;
  op.kind = kind;
  op.dir = place.dir;
  op.name = place.name;
  op.inode = inode;
  return op;
}

DiskOp RenameOp(const MemoryDisk::Place& from, const MemoryDisk::Place& to) {
  DiskOp op = NameOp(Kind::kRename, from, from.inode);
  op.to_dir = to.dir;
  op.to_name = to.name;
  return op;
}

// Makes a name that must be free.
Status Make(MemoryDisk* disk, Kind kind, const char* operation, const std::string& path, MemoryDisk::Place* place) {
  Status status = disk->Find(operation, path, place);
  if (!status.ok()) return status;
  if (place->inode != 0) return Status::IoError(EEXIST, operation, path);
  place->inode = disk->NewInode();
  disk->Do(NameOp(kind, *place, place->inode), place->path);
  return Status::Ok();
}

// As MemoryDisk::FindExisting; ENOTDIR for what is no directory.
Status FindDir(const MemoryDisk& disk, const char* operation, const std::string& path, MemoryDisk::Place* place) {
  Status status = disk.FindExisting(operation, path, place);
  if (status.ok() && !disk.node(place->inode).is_dir) return Status::IoError(ENOTDIR, operation, path);
  return status;
}

// Whether `to` may be replaced by `from`; 0 or an errno.
int Replaceable(MemoryDisk* disk, const MemoryDisk::Place& from, const MemoryDisk::Place& to) {
  if (from.dir == 0 || to.dir == 0) return EBUSY;
  const bool is_dir = disk->node(from.inode).is_dir;
  if (is_dir && to.path.starts_with(from.path + "/")) return EINVAL;
  if (to.inode == 0) return 0;
  const DiskImage::Node& target = disk->node(to.inode);
  if (target.is_dir && !is_dir) return EISDIR;
  if (!target.is_dir && is_dir) return ENOTDIR;
  return target.entries.empty() ? 0 : ENOTEMPTY;
}

}  // namespace

std::unique_ptr<WritableFile> MemoryDiskEnv::Open(uint64_t inode, const std::string& path, bool direct) {
  if (direct) disk_->OpenDirect(inode);
  disk_->counts().files += 1;
  return std::make_unique<MemoryWritableFile>(disk_, inode, path, direct);
}

Status MemoryDiskEnv::MakeDir(const std::string& path, uint32_t) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  return Make(disk_.get(), Kind::kMakeDir, "make directory", path, &place);
}

Status MemoryDiskEnv::NewWritableFile(const std::string& path, uint32_t, bool direct,
                                      std::unique_ptr<WritableFile>* file) {
  std::unique_ptr<WritableFile> replaced;  // outlives the lock: see memory_file.h
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = Make(disk_.get(), Kind::kCreate, "create", path, &place);
  if (status.ok()) replaced = std::exchange(*file, Open(place.inode, place.path, direct));
  return status;
}

Status MemoryDiskEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t, bool direct,
                                std::unique_ptr<WritableFile>* file) {
  const std::string operation = "rename to " + to;
  std::unique_ptr<WritableFile> replaced;  // outlives the lock: see memory_file.h
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place source, target;
  Status status = disk_->FindExisting(operation.c_str(), from, &source);
  if (status.ok()) status = disk_->Find(operation.c_str(), to, &target);
  if (!status.ok()) return status;
  if (target.inode != 0) return Status::IoError(EEXIST, operation, from);
  const int refused = Replaceable(disk_.get(), source, target);
  if (refused != 0) return Status::IoError(refused, operation, from);
  disk_->Do(RenameOp(source, target), source.path, target.path);
  if (disk_->node(source.inode).is_dir) return Status::IoError(EISDIR, "reuse", to);
  if (disk_->InUse(source.inode)) return Status::IoError(EBUSY, "reuse a file that is open elsewhere", to);
  replaced = std::exchange(*file, Open(source.inode, target.path, direct));
  return Status::Ok();
}

Status MemoryDiskEnv::NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) {
  std::unique_ptr<ReadableFile> replaced;  // as above
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = disk_->FindExisting("open", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  if (node.is_dir) return Status::IoError(EISDIR, "open", path);
  if (node.size_only) return Status::IoError(ENODATA, "open a file whose data was not kept", path);
  auto opened = std::make_unique<MemoryReadableFile>(disk_, place.inode, place.path, node.size(), direct);
  replaced = std::exchange(*file, std::move(opened));
  return Status::Ok();
}

Status MemoryDiskEnv::Rename(const std::string& from, const std::string& to) {
  const std::string operation = "rename to " + to;
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place source, target;
  Status status = disk_->FindExisting(operation.c_str(), from, &source);
  if (status.ok()) status = disk_->Find(operation.c_str(), to, &target);
  if (!status.ok()) return status;
  if (source.inode == target.inode) return Status::Ok();
  const int refused = Replaceable(disk_.get(), source, target);
  if (refused != 0) return Status::IoError(refused, operation, from);
  disk_->Do(RenameOp(source, target), source.path, target.path);
  disk_->FreeIfGone(target.inode);
  return Status::Ok();
}

Status MemoryDiskEnv::SyncDir(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = FindDir(*disk_, "fsync directory", path, &place);
  if (!status.ok()) return status;
  disk_->Do(NameOp(Kind::kSyncDir, place, place.inode), place.path);
  disk_->counts().syncs += 1;
  return Status::Ok();
}

Status MemoryDiskEnv::Unlink(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = disk_->FindExisting("unlink", path, &place);
  if (!status.ok()) return status;
  if (disk_->node(place.inode).is_dir) return Status::IoError(EISDIR, "unlink", path);
  disk_->Do(NameOp(Kind::kUnlink, place, place.inode), place.path);
  disk_->FreeIfGone(place.inode);
  return Status::Ok();
}

Status MemoryDiskEnv::RemoveDir(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = FindDir(*disk_, "remove directory", path, &place);
  if (!status.ok()) return status;
  if (place.dir == 0) return Status::IoError(EBUSY, "remove directory", path);
  if (!disk_->node(place.inode).entries.empty()) return Status::IoError(ENOTEMPTY, "remove directory", path);
  disk_->Do(NameOp(Kind::kRemoveDir, place, place.inode), place.path);
  disk_->FreeIfGone(place.inode);
  return Status::Ok();
}

Status MemoryDiskEnv::ListDir(const std::string& path, std::vector<std::string>* names) {
  names->clear();
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = FindDir(*disk_, "open directory", path, &place);
  if (!status.ok()) return status;
  for (const auto& [name, inode] : disk_->node(place.inode).entries) names->push_back(name);
  return Status::Ok();
}

Status MemoryDiskEnv::Stat(const std::string& path, FileInfo* info) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = disk_->FindExisting("lstat", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  *info = {node.is_dir ? FileKind::kDirectory : FileKind::kFile, node.size()};
  return Status::Ok();
}

Status MemoryDiskEnv::Lock(const std::string& path, uint32_t, std::unique_ptr<FileLock>* lock) {
  std::unique_ptr<FileLock> replaced;  // as above
  std::lock_guard guard(disk_->mutex());
  MemoryDisk::Place place;
  Status status = disk_->Find("lock", path, &place);
  if (!status.ok()) return status;
  if (place.inode == 0) {
    place.inode = disk_->NewInode();
    disk_->Do(NameOp(Kind::kCreate, place, place.inode), place.path);
  }
  if (disk_->node(place.inode).is_dir) return Status::IoError(EISDIR, "lock", path);
  if (!disk_->locks().insert(place.inode).second) return Status::IoError(EAGAIN, "lock", path);
  replaced = std::exchange(*lock, std::make_unique<MemoryFileLock>(disk_, place.inode, place.path));
  return Status::Ok();
}

Status MemoryDiskEnv::DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = FindDir(*disk_, "create", dir, &place);
  if (!status.ok()) return status;
  *alignment = kMemoryAlignment;
  return Status::Ok();
}

}  // namespace layerwise
