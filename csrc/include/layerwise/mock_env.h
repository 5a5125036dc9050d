// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_MOCK_ENV_H_
#define LAYERWISE_MOCK_ENV_H_

#include <cstdint>
#include <memory>

#include "layerwise/env.h"

namespace layerwise {

class MemoryDisk;

// An Env that touches no disk: names and the content of plain files (records) are kept
// in memory, of direct files (shards) only the size, and how many bytes were written.
// Everything above it runs as it does on a disk, at the cost of the processor alone.
//
// The root is there; relative paths start at it, and ".." is EINVAL. Nothing survives the
// object. A direct file demands alignment as a disk with sectors of 512 bytes does, and
// can't be read: ENODATA.
class MockEnv final : public EnvWrapper {
 public:
  MockEnv();
  ~MockEnv() override;

  struct Counts {
    uint64_t files = 0;  // that were created or taken over
    uint64_t bytes = 0;  // written to direct files
    uint64_t syncs = 0;  // of files and directories
  };
  Counts counts() const;

 private:
  explicit MockEnv(std::shared_ptr<MemoryDisk> disk);
  MockEnv(std::shared_ptr<MemoryDisk> disk, std::unique_ptr<Env> env);

  const std::shared_ptr<MemoryDisk> disk_;
  const std::unique_ptr<Env> env_;
};

}  // namespace layerwise

#endif  // LAYERWISE_MOCK_ENV_H_
