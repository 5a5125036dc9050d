// SPDX-License-Identifier: Apache-2.0
#include "memory_disk.h"

#include <algorithm>
#include <cerrno>
#include <vector>

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

}  // namespace

Status MemoryDisk::Find(const char* operation, const std::string& path, Place* place) const {
  std::vector<std::string> parts;
  if (!Split(path, &parts)) return Status::IoError(EINVAL, operation, path);
  *place = {"/", 0, "", DiskImage::kRoot};
  for (const std::string& part : parts) {
    if (place->inode == 0) return Status::IoError(ENOENT, operation, path);
    const DiskImage::Node& dir = node(place->inode);
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

void MemoryDisk::Do(const DiskOp& op, const std::string& path, const std::string& to) {
  if (Before(op, path, to)) Apply(op, &live_);
}

void MemoryDisk::Write(uint64_t inode, std::string_view data, uint64_t offset, const std::string& path) {
  DiskOp op;
  op.inode = inode;
  op.offset = offset;
  if (node(inode).size_only) {
    op.kind = Kind::kAllocate;
    op.offset += data.size();
    counts_.not_kept += data.size();
  } else {
    op.kind = Kind::kWrite;
    op.data = data;
  }
  Do(op, path);
}

void MemoryDisk::OpenDirect(uint64_t inode) {
  if (direct_files_ == DirectFiles::kWhole) return;
  DiskImage::Node& file = live_.nodes.at(inode);
  file.size_only = file.size();
  file.content = std::string();
}

void MemoryDisk::RemoveUser(uint64_t inode) {
  const auto users = users_.find(inode);
  if (--users->second > 0) return;
  users_.erase(users);
  FreeIfGone(inode);
}

void MemoryDisk::FreeIfGone(uint64_t inode) {
  const auto found = live_.nodes.find(inode);
  if (found == live_.nodes.end() || inode == DiskImage::kRoot) return;
  if (found->second.links == 0 && !InUse(inode)) live_.nodes.erase(found);
}

}  // namespace layerwise
