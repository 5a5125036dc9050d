#include "memory_disk.h"

#include <fnmatch.h>

#include <cerrno>

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

// Empty for the root; false if a part is "..".
bool Split(const std::string& path, std::vector<std::string>* parts) {
  size_t begin = 0;
  while (begin < path.size()) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    if (part == "..") return false;
    if (!part.empty() && part != ".") parts->push_back(part);
    begin = end + 1;
  }
  return true;
}

std::string Describe(const DiskOp& op, const std::string& path) {
  const std::string text = std::string(KindName(op.kind)) + " " + path;
  switch (op.kind) {
    case Kind::kWrite:
      return text + " offset=" + std::to_string(op.offset) + " bytes=" + std::to_string(op.data.size());
    case Kind::kAllocate:
    case Kind::kTruncate:
      return text + " size=" + std::to_string(op.offset);
    case Kind::kRename:
      return text + " -> " + op.text;
    default:
      return text;
  }
}

}  // namespace

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kMakeDir:
      return "make_dir";
    case Kind::kCreate:
      return "create";
    case Kind::kWrite:
      return "write";
    case Kind::kAllocate:
      return "allocate";
    case Kind::kTruncate:
      return "truncate";
    case Kind::kSync:
      return "sync";
    case Kind::kRename:
      return "rename";
    case Kind::kUnlink:
      return "unlink";
    case Kind::kRemoveDir:
      return "remove_dir";
    case Kind::kSyncDir:
      return "sync_dir";
    case Kind::kMark:
      break;
  }
  return "mark";
}

Status MemoryDisk::Find(const char* operation, const std::string& path, Place* place) const {
  std::vector<std::string> parts;
  if (!Split(path, &parts)) return Status::IoError(EINVAL, operation, path);
  *place = {"/", 0, "", DiskImage::kRoot};
  for (const std::string& part : parts) {
    if (place->inode == 0) return Status::IoError(ENOENT, operation, path);
    const DiskImage::Node& dir = live_.nodes.at(place->inode);
    if (!dir.is_dir) return Status::IoError(ENOTDIR, operation, path);
    const auto entry = dir.entries.find(part);
    place->path += (place->dir == 0 ? "" : "/") + part;
    place->dir = place->inode;
    place->name = part;
    place->inode = entry == dir.entries.end() ? 0 : entry->second;
  }
  return Status::Ok();
}

Status MemoryDisk::FindExisting(const char* operation, const std::string& path, Place* place) const {
  Status status = Find(operation, path, place);
  if (status.ok() && place->inode == 0) return Status::IoError(ENOENT, operation, path);
  return status;
}

void MemoryDisk::AddDrop(std::string operation, std::string pattern) {
  drops_.emplace_back(std::move(operation), std::move(pattern));
}

bool MemoryDisk::Dropped(const DiskOp& op, const std::string& path) {
  for (const auto& [operation, pattern] : drops_) {
    if (operation != KindName(op.kind)) continue;
    const bool matches = fnmatch(pattern.c_str(), path.c_str(), 0) == 0 ||
                         (op.kind == Kind::kRename && fnmatch(pattern.c_str(), op.text.c_str(), 0) == 0);
    if (matches) {
      ++dropped_;
      return true;
    }
  }
  return false;
}

void MemoryDisk::Do(DiskOp op, const std::string& path) {
  if (Dropped(op, path)) return;
  Apply(op, &live_);
  op.text = Describe(op, path);
  log_.push_back(std::move(op));
}

}  // namespace layerwise
