// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTING_LOGGED_DISK_H_
#define LAYERWISE_TESTING_LOGGED_DISK_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "memory_disk.h"

namespace layerwise {

// A MemoryDisk that notes every operation, for what a crash after any of them leaves
// (after_crash.h), and leaves out those that it is told to.
//
// Threads: as for MemoryDisk, every call REQUIRES that the caller holds mutex().
class LoggedDisk final : public MemoryDisk {
 public:
  explicit LoggedDisk(const DiskImage& image) : MemoryDisk(DirectFiles::kWhole, image), initial_(image) {}

  const DiskImage& initial() const { return initial_; }
  const std::vector<DiskOp>& log() const { return log_; }
  // Operation i of the log, for people.
  const std::string& text(size_t i) const { return texts_.at(i); }

  void Mark(const std::string& text) { Do(DiskOp(), text); }
  std::vector<std::pair<size_t, std::string>> Marks() const;

  // From now on operations of this kind on a path that matches are acknowledged, and do nothing.
  void Drop(std::string operation, std::string pattern);
  uint64_t dropped() const { return dropped_; }

 protected:
  bool Before(const DiskOp& op, const std::string& path, const std::string& to) override;

 private:
  const DiskImage initial_;
  std::vector<DiskOp> log_;
  std::vector<std::string> texts_;
  std::vector<std::pair<std::string, std::string>> drops_;
  uint64_t dropped_ = 0;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_LOGGED_DISK_H_
