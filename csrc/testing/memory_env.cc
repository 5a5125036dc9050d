#include "memory_env.h"

#include <algorithm>
#include <cerrno>

#include "memory_disk.h"
#include "memory_file.h"

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;
using Place = MemoryDisk::Place;

DiskOp NameOp(Kind kind, const Place& place, uint64_t inode) {
  DiskOp op;
  op.kind = kind;
  op.dir = place.dir;
  op.name = place.name;
  op.inode = inode;
  return op;
}

DiskOp RenameOp(const Place& from, const Place& to) {
  DiskOp op = NameOp(Kind::kRename, from, from.inode);
  op.to_dir = to.dir;
  op.to_name = to.name;
  op.text = to.path;
  return op;
}

// Makes a name that must be free.
Status Make(MemoryDisk* disk, Kind kind, const char* operation, const std::string& path, Place* place) {
  Status status = disk->Find(operation, path, place);
  if (!status.ok()) return status;
  if (place->inode != 0) return Status::IoError(EEXIST, operation, path);
  place->inode = disk->NewInode();
  disk->Do(NameOp(kind, *place, place->inode), place->path);
  return Status::Ok();
}

// Whether `to` may be replaced by `from`; 0 or an errno.
int Replaceable(MemoryDisk* disk, const Place& from, const Place& to) {
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

MemoryEnv::MemoryEnv() : MemoryEnv(DiskImage()) {}

MemoryEnv::MemoryEnv(DiskImage image) : disk_(std::make_shared<MemoryDisk>(std::move(image))) {}

MemoryEnv::~MemoryEnv() = default;

size_t MemoryEnv::LogSize() const {
  std::lock_guard lock(disk_->mutex());
  return disk_->log().size();
}

std::string MemoryEnv::LogEntry(size_t i) const {
  std::lock_guard lock(disk_->mutex());
  return disk_->log().at(i).text;
}

void MemoryEnv::Mark(const std::string& text) {
  std::lock_guard lock(disk_->mutex());
  disk_->Do(DiskOp(), text);
}

std::vector<std::pair<size_t, std::string>> MemoryEnv::Marks() const {
  const std::string prefix = std::string(KindName(Kind::kMark)) + " ";
  std::lock_guard lock(disk_->mutex());
  std::vector<std::pair<size_t, std::string>> marks;
  for (size_t i = 0; i < disk_->log().size(); ++i) {
    const DiskOp& op = disk_->log()[i];
    if (op.kind == Kind::kMark) marks.emplace_back(i, op.text.substr(prefix.size()));
  }
  return marks;
}

std::unique_ptr<MemoryEnv> MemoryEnv::Crash(size_t prefix, uint64_t seed, CrashPolicy policy) const {
  std::lock_guard lock(disk_->mutex());
  const auto ops = std::span(disk_->log()).first(prefix);
  return std::unique_ptr<MemoryEnv>(new MemoryEnv(AfterCrash(disk_->initial(), ops, seed, policy)));
}

Status MemoryEnv::Drop(const std::string& operation, const std::string& path_pattern) {
  static constexpr std::string_view kAllowed[] = {"sync", "sync_dir", "rename", "write"};
  if (std::find(std::begin(kAllowed), std::end(kAllowed), operation) == std::end(kAllowed)) {
    return Status::InvalidArgument("operation '" + operation + "'; allowed: sync, sync_dir, rename, write");
  }
  std::lock_guard lock(disk_->mutex());
  disk_->AddDrop(operation, path_pattern);
  return Status::Ok();
}

uint64_t MemoryEnv::dropped() const {
  std::lock_guard lock(disk_->mutex());
  return disk_->dropped();
}

Status MemoryEnv::MakeDir(const std::string& path, uint32_t) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  return Make(disk_.get(), Kind::kMakeDir, "make directory", path, &place);
}

Status MemoryEnv::NewWritableFile(const std::string& path, uint32_t, bool direct,
                                  std::unique_ptr<WritableFile>* file) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = Make(disk_.get(), Kind::kCreate, "create", path, &place);
  if (status.ok()) *file = std::make_unique<MemoryWritableFile>(disk_, place.inode, place.path, direct);
  return status;
}

Status MemoryEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t, bool direct,
                            std::unique_ptr<WritableFile>* file) {
  const std::string operation = "rename to " + to;
  std::lock_guard lock(disk_->mutex());
  Place source, target;
  Status status = disk_->FindExisting(operation.c_str(), from, &source);
  if (status.ok()) status = disk_->Find(operation.c_str(), to, &target);
  if (!status.ok()) return status;
  if (target.inode != 0) return Status::IoError(EEXIST, operation, from);
  const int refused = Replaceable(disk_.get(), source, target);
  if (refused != 0) return Status::IoError(refused, operation, from);
  disk_->Do(RenameOp(source, target), source.path);
  if (disk_->node(source.inode).is_dir) return Status::IoError(EISDIR, "reuse", to);
  if (disk_->InUse(source.inode)) return Status::IoError(EBUSY, "reuse a file that is open elsewhere", to);
  *file = std::make_unique<MemoryWritableFile>(disk_, source.inode, target.path, direct);
  return Status::Ok();
}

Status MemoryEnv::NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("open", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  if (node.is_dir) return Status::IoError(EISDIR, "open", path);
  *file = std::make_unique<MemoryReadableFile>(disk_, place.inode, place.path, node.content.size(), direct);
  return Status::Ok();
}

Status MemoryEnv::Rename(const std::string& from, const std::string& to) {
  const std::string operation = "rename to " + to;
  std::lock_guard lock(disk_->mutex());
  Place source, target;
  Status status = disk_->FindExisting(operation.c_str(), from, &source);
  if (status.ok()) status = disk_->Find(operation.c_str(), to, &target);
  if (!status.ok()) return status;
  if (source.inode == target.inode) return Status::Ok();
  const int refused = Replaceable(disk_.get(), source, target);
  if (refused != 0) return Status::IoError(refused, operation, from);
  disk_->Do(RenameOp(source, target), source.path);
  return Status::Ok();
}

Status MemoryEnv::SyncDir(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("fsync directory", path, &place);
  if (!status.ok()) return status;
  if (!disk_->node(place.inode).is_dir) return Status::IoError(ENOTDIR, "fsync directory", path);
  disk_->Do(NameOp(Kind::kSyncDir, place, place.inode), place.path);
  return Status::Ok();
}

Status MemoryEnv::Unlink(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("unlink", path, &place);
  if (!status.ok()) return status;
  if (disk_->node(place.inode).is_dir) return Status::IoError(EISDIR, "unlink", path);
  disk_->Do(NameOp(Kind::kUnlink, place, place.inode), place.path);
  return Status::Ok();
}

Status MemoryEnv::RemoveDir(const std::string& path) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("remove directory", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  if (!node.is_dir) return Status::IoError(ENOTDIR, "remove directory", path);
  if (place.dir == 0) return Status::IoError(EBUSY, "remove directory", path);
  if (!node.entries.empty()) return Status::IoError(ENOTEMPTY, "remove directory", path);
  disk_->Do(NameOp(Kind::kRemoveDir, place, place.inode), place.path);
  return Status::Ok();
}

Status MemoryEnv::ListDir(const std::string& path, std::vector<std::string>* names) {
  names->clear();
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("open directory", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  if (!node.is_dir) return Status::IoError(ENOTDIR, "open directory", path);
  for (const auto& [name, inode] : node.entries) names->push_back(name);
  return Status::Ok();
}

Status MemoryEnv::Stat(const std::string& path, FileInfo* info) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("lstat", path, &place);
  if (!status.ok()) return status;
  const DiskImage::Node& node = disk_->node(place.inode);
  *info = {node.is_dir ? FileKind::kDirectory : FileKind::kFile, node.content.size()};
  return Status::Ok();
}

Status MemoryEnv::Lock(const std::string& path, uint32_t, std::unique_ptr<FileLock>* lock) {
  std::lock_guard guard(disk_->mutex());
  Place place;
  Status status = disk_->Find("lock", path, &place);
  if (!status.ok()) return status;
  if (place.inode == 0) {
    place.inode = disk_->NewInode();
    disk_->Do(NameOp(Kind::kCreate, place, place.inode), place.path);
  }
  if (disk_->node(place.inode).is_dir) return Status::IoError(EISDIR, "lock", path);
  if (!disk_->locks().insert(place.inode).second) return Status::IoError(EAGAIN, "lock", path);
  *lock = std::make_unique<MemoryFileLock>(disk_, place.inode, place.path);
  return Status::Ok();
}

Status MemoryEnv::DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) {
  std::lock_guard lock(disk_->mutex());
  Place place;
  Status status = disk_->FindExisting("create", dir, &place);
  if (!status.ok()) return status;
  if (!disk_->node(place.inode).is_dir) return Status::IoError(ENOTDIR, "create", dir);
  *alignment = kMemoryAlignment;
  return Status::Ok();
}

}  // namespace layerwise
