// SPDX-License-Identifier: Apache-2.0
#include "layerwise/mock_env.h"

#include <mutex>
#include <utility>

#include "memory_disk_env.h"

namespace layerwise {

MockEnv::MockEnv() : MockEnv(std::make_shared<MemoryDisk>(MemoryDisk::DirectFiles::kSizeOnly)) {}

MockEnv::MockEnv(std::shared_ptr<MemoryDisk> disk) : MockEnv(disk, std::make_unique<MemoryDiskEnv>(disk)) {}

MockEnv::MockEnv(std::shared_ptr<MemoryDisk> disk, std::unique_ptr<Env> env)
    : EnvWrapper(env.get()), disk_(std::move(disk)), env_(std::move(env)) {}

MockEnv::~MockEnv() = default;

MockEnv::Counts MockEnv::counts() const {
  std::lock_guard lock(disk_->mutex());
  const MemoryDisk::Counts& counts = disk_->counts();
  return {counts.files, counts.not_kept, counts.syncs};
}

}  // namespace layerwise
