#include "layerwise/mock_env.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace layerwise {

namespace {

constexpr DirectIoAlignment kSectors{512, 512};

std::string ParentOf(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

// "/a/b" for "/a//b/." and the like.
std::string Clean(const std::string& path) {
  std::string clean;
  for (size_t begin = 0; begin < path.size();) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    if (!part.empty() && part != ".") clean += "/" + part;
    begin = end + 1;
  }
  return clean.empty() ? "/" : clean;
}

}  // namespace

class MockEnv::File final : public WritableFile {
 public:
  File(std::shared_ptr<Disk> disk, std::shared_ptr<Node> node, bool direct)
      : disk_(std::move(disk)), node_(std::move(node)), direct_(direct) {}

  bool direct() const override { return direct_; }
  DirectIoAlignment alignment() const override { return direct_ ? kSectors : DirectIoAlignment{}; }

  Status Pwrite(const void* data, size_t n, uint64_t offset) override {
    std::lock_guard lock(disk_->mutex);
    node_->size = std::max(node_->size, offset + n);
    if (direct_) {
      disk_->counts.bytes += n;
    } else {
      if (node_->content.size() < offset + n) node_->content.resize(offset + n);
      std::memcpy(node_->content.data() + offset, data, n);
    }
    return Status::Ok();
  }

  Status Allocate(uint64_t size) override {
    std::lock_guard lock(disk_->mutex);
    node_->size = std::max(node_->size, size);
    return Status::Ok();
  }

  Status Truncate(uint64_t size) override {
    std::lock_guard lock(disk_->mutex);
    node_->size = size;
    if (!direct_) node_->content.resize(size);
    return Status::Ok();
  }

  Status Sync() override {
    std::lock_guard lock(disk_->mutex);
    disk_->counts.syncs += 1;
    return Status::Ok();
  }

  Status Close() override { return Status::Ok(); }

 private:
  const std::shared_ptr<Disk> disk_;
  const std::shared_ptr<Node> node_;
  const bool direct_;
};

class MockEnv::Reader final : public ReadableFile {
 public:
  explicit Reader(std::string content) : content_(std::move(content)) {}

  uint64_t size() const override { return content_.size(); }
  bool direct() const override { return false; }
  DirectIoAlignment alignment() const override { return {}; }

  Status Pread(void* data, size_t n, uint64_t offset, size_t* got) override {
    *got = offset < content_.size() ? std::min<size_t>(n, content_.size() - offset) : 0;
    std::memcpy(data, content_.data() + std::min<size_t>(offset, content_.size()), *got);
    return Status::Ok();
  }

  Status Close() override { return Status::Ok(); }

 private:
  const std::string content_;
};

class MockEnv::Held final : public FileLock {
 public:
  Held(std::shared_ptr<Disk> disk, std::string path, std::shared_ptr<Node> node)
      : disk_(std::move(disk)), path_(std::move(path)), node_(std::move(node)) {}
  ~Held() override { static_cast<void>(Release()); }

  Status Release() override {
    std::lock_guard lock(disk_->mutex);
    if (held_) node_->locked = false;
    held_ = false;
    return Status::Ok();
  }

  Status Write(std::string_view data) override {
    std::lock_guard lock(disk_->mutex);
    if (!held_) return Status::IoError(EBADF, "write a lock", path_);
    node_->content = data;
    node_->size = data.size();
    return Status::Ok();
  }

  Status Read(uint64_t cap, std::string* data) override {
    std::lock_guard lock(disk_->mutex);
    if (!held_) return Status::IoError(EBADF, "read a lock", path_);
    if (node_->content.size() > cap) return Status::IoError(EFBIG, "read a lock", path_);
    *data = node_->content;
    return Status::Ok();
  }

  Status HeldPathIsMine(bool* mine) override {
    std::lock_guard lock(disk_->mutex);
    const auto found = disk_->names.find(path_);
    *mine = held_ && found != disk_->names.end() && found->second == node_;
    return Status::Ok();
  }

 private:
  const std::shared_ptr<Disk> disk_;
  const std::string path_;
  const std::shared_ptr<Node> node_;
  bool held_ = true;
};

MockEnv::MockEnv() : disk_(std::make_shared<Disk>()) {
  auto root = std::make_shared<Node>();
  root->is_dir = true;
  disk_->names.emplace("/", std::move(root));
}

MockEnv::Counts MockEnv::counts() const {
  std::lock_guard lock(disk_->mutex);
  return disk_->counts;
}

Status MockEnv::CheckParent(const char* operation, const std::string& path) const {
  std::shared_ptr<Node> parent;
  Status status = Find(operation, ParentOf(path), &parent);
  return status.ok() && !parent->is_dir ? Status::IoError(ENOTDIR, operation, path) : status;
}

Status MockEnv::Find(const char* operation, const std::string& path, std::shared_ptr<Node>* node) const {
  const auto found = disk_->names.find(path);
  if (found == disk_->names.end()) return Status::IoError(ENOENT, operation, path);
  *node = found->second;
  return Status::Ok();
}

bool MockEnv::HasChildren(const std::string& path) const {
  const std::string prefix = path == "/" ? path : path + "/";
  const auto next = disk_->names.upper_bound(prefix);
  return next != disk_->names.end() && next->first.starts_with(prefix);
}

Status MockEnv::MakeDir(const std::string& given, uint32_t) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  Status status = CheckParent("make directory", path);
  if (!status.ok()) return status;
  auto node = std::make_shared<Node>();
  node->is_dir = true;
  const bool made = disk_->names.emplace(path, std::move(node)).second;
  return made ? Status::Ok() : Status::IoError(EEXIST, "make directory", path);
}

Status MockEnv::NewWritableFile(const std::string& given, uint32_t, bool direct,
                                std::unique_ptr<WritableFile>* file) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  Status status = CheckParent("create", path);
  if (!status.ok()) return status;
  auto node = std::make_shared<Node>();
  node->discarded = direct;
  if (!disk_->names.emplace(path, node).second) return Status::IoError(EEXIST, "create", path);
  disk_->counts.files += 1;
  *file = std::make_unique<File>(disk_, std::move(node), direct);
  return Status::Ok();
}

Status MockEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t, bool direct,
                          std::unique_ptr<WritableFile>* file) {
  {
    std::lock_guard lock(disk_->mutex);
    if (disk_->names.contains(Clean(to))) return Status::IoError(EEXIST, "reuse", to);
  }
  Status status = Rename(from, to);
  if (!status.ok()) return status;
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  status = Find("reuse", Clean(to), &node);
  if (!status.ok()) return status;
  node->discarded = direct;
  disk_->counts.files += 1;
  *file = std::make_unique<File>(disk_, std::move(node), direct);
  return Status::Ok();
}

Status MockEnv::NewReadableFile(const std::string& given, bool, std::unique_ptr<ReadableFile>* file) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("open", path, &node);
  if (!status.ok()) return status;
  if (node->is_dir) return Status::IoError(EISDIR, "open", path);
  if (node->discarded) return Status::IoError(ENODATA, "open a file whose data was not kept", path);
  *file = std::make_unique<Reader>(node->content);
  return Status::Ok();
}

Status MockEnv::Rename(const std::string& given_from, const std::string& given_to) {
  const std::string from = Clean(given_from), to = Clean(given_to);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("rename", from, &node);
  if (status.ok()) status = CheckParent("rename", to);
  if (!status.ok()) return status;
  if (node->is_dir) return Status::IoError(EISDIR, "rename", from);
  const auto there = disk_->names.find(to);
  if (there != disk_->names.end() && there->second->is_dir) return Status::IoError(EISDIR, "rename", to);
  disk_->names.erase(from);
  disk_->names.insert_or_assign(to, std::move(node));
  return Status::Ok();
}

Status MockEnv::SyncDir(const std::string& given) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("fsync directory", path, &node);
  if (!status.ok()) return status;
  disk_->counts.syncs += 1;
  return node->is_dir ? Status::Ok() : Status::IoError(ENOTDIR, "fsync directory", path);
}

Status MockEnv::Unlink(const std::string& given) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("unlink", path, &node);
  if (!status.ok()) return status;
  if (node->is_dir) return Status::IoError(EISDIR, "unlink", path);
  disk_->names.erase(path);
  return Status::Ok();
}

Status MockEnv::RemoveDir(const std::string& given) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("remove directory", path, &node);
  if (!status.ok()) return status;
  if (!node->is_dir) return Status::IoError(ENOTDIR, "remove directory", path);
  if (HasChildren(path)) return Status::IoError(ENOTEMPTY, "remove directory", path);
  disk_->names.erase(path);
  return Status::Ok();
}

Status MockEnv::ListDir(const std::string& given, std::vector<std::string>* names) {
  const std::string path = Clean(given);
  names->clear();
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("open directory", path, &node);
  if (!status.ok()) return status;
  if (!node->is_dir) return Status::IoError(ENOTDIR, "open directory", path);
  const std::string prefix = path == "/" ? path : path + "/";
  for (auto next = disk_->names.upper_bound(prefix);
       next != disk_->names.end() && next->first.starts_with(prefix); ++next) {
    const std::string name = next->first.substr(prefix.size());
    if (name.find('/') == std::string::npos) names->push_back(name);
  }
  return Status::Ok();
}

Status MockEnv::Stat(const std::string& given, FileInfo* info) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("lstat", path, &node);
  if (status.ok()) *info = {node->is_dir ? FileKind::kDirectory : FileKind::kFile, node->size};
  return status;
}

Status MockEnv::Lock(const std::string& given, uint32_t, std::unique_ptr<FileLock>* lock) {
  const std::string path = Clean(given);
  std::lock_guard guard(disk_->mutex);
  Status status = CheckParent("lock", path);
  if (!status.ok()) return status;
  auto& node = disk_->names.try_emplace(path, std::make_shared<Node>()).first->second;
  if (node->is_dir) return Status::IoError(EISDIR, "lock", path);
  if (node->locked) return Status::IoError(EAGAIN, "lock", path);
  node->locked = true;
  *lock = std::make_unique<Held>(disk_, path, node);
  return Status::Ok();
}

Status MockEnv::DirectIo(const std::string& given, std::optional<DirectIoAlignment>* alignment) {
  const std::string path = Clean(given);
  std::lock_guard lock(disk_->mutex);
  std::shared_ptr<Node> node;
  Status status = Find("create", path, &node);
  if (status.ok()) *alignment = kSectors;
  return status;
}

}  // namespace layerwise
