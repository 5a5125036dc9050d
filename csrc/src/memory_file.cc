// SPDX-License-Identifier: Apache-2.0
#include "memory_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

bool Misaligned(DirectIoAlignment alignment, const void* data, size_t n, uint64_t offset) {
  return reinterpret_cast<uintptr_t>(data) % alignment.memory != 0 || n % alignment.offset != 0 ||
         offset % alignment.offset != 0;
}

DiskOp FileOp(Kind kind, uint64_t inode, uint64_t offset = 0) {
  DiskOp op;
  op.kind = kind;
  op.inode = inode;
  op.offset = offset;
  return op;
}

}  // namespace

Status MemoryWritableFile::Pwrite(const void* data, size_t n, uint64_t offset) {
  std::lock_guard lock(disk_->mutex());
  if (closed_) return Status::IoError(EBADF, "pwrite", path_);
  if (Misaligned(alignment(), data, n, offset)) return Status::IoError(EINVAL, "pwrite", path_);
  if (n > 0) disk_->Write(inode_, {static_cast<const char*>(data), n}, offset, path_);
  return Status::Ok();
}

Status MemoryWritableFile::Allocate(uint64_t size) {
  std::lock_guard lock(disk_->mutex());
  if (closed_) return Status::IoError(EBADF, "fallocate", path_);
  disk_->Do(FileOp(Kind::kAllocate, inode_, size), path_);
  return Status::Ok();
}

Status MemoryWritableFile::Truncate(uint64_t size) {
  std::lock_guard lock(disk_->mutex());
  if (closed_) return Status::IoError(EBADF, "ftruncate", path_);
  disk_->Do(FileOp(Kind::kTruncate, inode_, size), path_);
  return Status::Ok();
}

Status MemoryWritableFile::Sync() {
  std::lock_guard lock(disk_->mutex());
  if (closed_) return Status::IoError(EBADF, "fdatasync", path_);
  disk_->Do(FileOp(Kind::kSync, inode_), path_);
  disk_->counts().syncs += 1;
  return Status::Ok();
}

Status MemoryWritableFile::Close() {
  std::lock_guard lock(disk_->mutex());
  if (!closed_) disk_->RemoveUser(inode_);
  closed_ = true;
  return Status::Ok();
}

Status MemoryReadableFile::Pread(void* data, size_t n, uint64_t offset, size_t* got) {
  *got = 0;
  std::lock_guard lock(disk_->mutex());
  if (closed_) return Status::IoError(EBADF, "pread", path_);
  if (Misaligned(alignment(), data, n, offset)) return Status::IoError(EINVAL, "pread", path_);
  const std::string& content = disk_->node(inode_).content;
  if (offset >= content.size()) return Status::Ok();
  *got = std::min<size_t>(n, content.size() - offset);
  std::memcpy(data, content.data() + offset, *got);
  return Status::Ok();
}

Status MemoryReadableFile::Close() {
  std::lock_guard lock(disk_->mutex());
  if (!closed_) disk_->RemoveUser(inode_);
  closed_ = true;
  return Status::Ok();
}

Status MemoryFileLock::Release() {
  std::lock_guard lock(disk_->mutex());
  if (!released_) {
    disk_->locks().erase(inode_);
    disk_->RemoveUser(inode_);
  }
  released_ = true;
  return Status::Ok();
}

Status MemoryFileLock::Write(std::string_view data) {
  std::lock_guard lock(disk_->mutex());
  if (released_) return Status::IoError(EBADF, "pwrite", path_);
  disk_->Write(inode_, data, 0, path_);
  disk_->Do(FileOp(Kind::kTruncate, inode_, data.size()), path_);
  disk_->Do(FileOp(Kind::kSync, inode_), path_);
  return Status::Ok();
}

Status MemoryFileLock::Read(uint64_t cap, std::string* data) {
  std::lock_guard lock(disk_->mutex());
  if (released_) return Status::IoError(EBADF, "read", path_);
  const std::string& content = disk_->node(inode_).content;
  if (content.size() > cap) return Status::IoError(EFBIG, "read", path_);
  *data = content;
  return Status::Ok();
}

Status MemoryFileLock::HeldPathIsMine(bool* mine) {
  std::lock_guard lock(disk_->mutex());
  MemoryDisk::Place place;
  Status status = disk_->Find("lstat", path_, &place);
  const bool gone = status.error_number() == ENOENT || status.error_number() == ENOTDIR;
  *mine = !released_ && status.ok() && place.inode == inode_;
  return gone ? Status::Ok() : status;
}

}  // namespace layerwise
