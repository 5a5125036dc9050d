// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_MEMORY_FILE_H_
#define LAYERWISE_SRC_MEMORY_FILE_H_

#include <memory>
#include <string>

#include "layerwise/env.h"
#include "memory_disk.h"

namespace layerwise {

// Open files and locks of a MemoryDisk. Closing one takes the disk's mutex: whoever holds
// that must not destroy one.

class MemoryWritableFile final : public WritableFile {
 public:
  // REQUIRES: the caller holds the disk's mutex; here and for the other two.
  MemoryWritableFile(std::shared_ptr<MemoryDisk> disk, uint64_t inode, std::string path, bool direct)
      : disk_(std::move(disk)), inode_(inode), path_(std::move(path)), direct_(direct) {
    disk_->AddUser(inode_);
  }
  ~MemoryWritableFile() override { static_cast<void>(Close()); }

  bool direct() const override { return direct_; }
  DirectIoAlignment alignment() const override { return direct_ ? kMemoryAlignment : DirectIoAlignment{}; }
  Status Pwrite(const void* data, size_t n, uint64_t offset) override;
  Status Allocate(uint64_t size) override;
  Status Truncate(uint64_t size) override;
  Status Sync() override;
  Status Close() override;

 private:
  const std::shared_ptr<MemoryDisk> disk_;
  const uint64_t inode_;
  const std::string path_;
  const bool direct_;
  bool closed_ = false;
};

class MemoryReadableFile final : public ReadableFile {
 public:
  MemoryReadableFile(std::shared_ptr<MemoryDisk> disk, uint64_t inode, std::string path, uint64_t size, bool direct)
      : disk_(std::move(disk)), inode_(inode), path_(std::move(path)), size_(size), direct_(direct) {
    disk_->AddUser(inode_);
  }
  ~MemoryReadableFile() override { static_cast<void>(Close()); }

  uint64_t size() const override { return size_; }
  bool direct() const override { return direct_; }
  DirectIoAlignment alignment() const override { return direct_ ? kMemoryAlignment : DirectIoAlignment{}; }
  Status Pread(void* data, size_t n, uint64_t offset, size_t* got) override;
  Status Close() override;

 private:
  const std::shared_ptr<MemoryDisk> disk_;
  const uint64_t inode_;
  const std::string path_;
  const uint64_t size_;
  const bool direct_;
  bool closed_ = false;
};

class MemoryFileLock final : public FileLock {
 public:
  MemoryFileLock(std::shared_ptr<MemoryDisk> disk, uint64_t inode, std::string path)
      : disk_(std::move(disk)), inode_(inode), path_(std::move(path)) {
    disk_->AddUser(inode_);
  }
  ~MemoryFileLock() override { static_cast<void>(Release()); }

  Status Release() override;
  Status Write(std::string_view data) override;
  Status Read(uint64_t cap, std::string* data) override;
  Status HeldPathIsMine(bool* mine) override;

 private:
  const std::shared_ptr<MemoryDisk> disk_;
  const uint64_t inode_;
  const std::string path_;
  bool released_ = false;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_MEMORY_FILE_H_
