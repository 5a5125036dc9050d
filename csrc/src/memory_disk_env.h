// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_MEMORY_DISK_ENV_H_
#define LAYERWISE_SRC_MEMORY_DISK_ENV_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "layerwise/env.h"
#include "memory_disk.h"

namespace layerwise {

// The Env of a MemoryDisk. Relative paths start at the root; ".." is EINVAL; there are no
// links. Direct files demand kMemoryAlignment of addresses, offsets and lengths (EINVAL),
// and so does DirectIo. What is not kept can't be read: ENODATA.
//
// Files keep the disk, and may outlive the Env. Threads: every method may be called by
// several threads at once.
class MemoryDiskEnv final : public Env {
 public:
  explicit MemoryDiskEnv(std::shared_ptr<MemoryDisk> disk) : disk_(std::move(disk)) {}

  Status MakeDir(const std::string& path, uint32_t mode) override;
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override;
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override;
  Status NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) override;
  Status Rename(const std::string& from, const std::string& to) override;
  Status SyncDir(const std::string& path) override;
  Status Unlink(const std::string& path) override;
  Status RemoveDir(const std::string& path) override;
  Status ListDir(const std::string& path, std::vector<std::string>* names) override;
  Status Stat(const std::string& path, FileInfo* info) override;
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) override;
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override;

 private:
  // REQUIRES: the disk's mutex is held.
  std::unique_ptr<WritableFile> Open(uint64_t inode, const std::string& path, bool direct);

  const std::shared_ptr<MemoryDisk> disk_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_MEMORY_DISK_ENV_H_
