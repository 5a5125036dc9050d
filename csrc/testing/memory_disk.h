#ifndef LAYERWISE_TESTING_MEMORY_DISK_H_
#define LAYERWISE_TESTING_MEMORY_DISK_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "disk_image.h"
#include "layerwise/env.h"

namespace layerwise {

// The state that a MemoryEnv and its open files share.
//
// Threads: every call REQUIRES that the caller holds mutex(), but for mutex().
class MemoryDisk {
 public:
  // A path taken apart: the directory that holds the name, and what the name
  // leads to (0 if nothing).
  struct Place {
    std::string path;  // absolute
    uint64_t dir = 0;  // 0 for the root itself
    std::string name;
    uint64_t inode = 0;
  };

  explicit MemoryDisk(DiskImage image) : initial_(image), live_(std::move(image)) {}

  std::mutex& mutex() { return mutex_; }

  // ENOENT if the directory is missing, ENOTDIR if it is none.
  Status Find(const char* operation, const std::string& path, Place* place) const;
  // As Find; ENOENT too if the name leads nowhere.
  Status FindExisting(const char* operation, const std::string& path, Place* place) const;

  DiskImage::Node& node(uint64_t inode) { return live_.nodes.at(inode); }
  uint64_t NewInode() { return live_.next_inode++; }

  // Does the operation and logs it, unless a Drop catches it.
  void Do(DiskOp op, const std::string& path);

  void AddDrop(std::string operation, std::string pattern);
  uint64_t dropped() const { return dropped_; }

  const DiskImage& initial() const { return initial_; }
  const std::vector<DiskOp>& log() const { return log_; }
  std::set<uint64_t>& locks() { return locks_; }

  // Open files and locks of an inode.
  void AddUser(uint64_t inode) { ++users_[inode]; }
  void RemoveUser(uint64_t inode) { --users_[inode]; }
  bool InUse(uint64_t inode) const { return users_.contains(inode) && users_.at(inode) > 0; }

 private:
  bool Dropped(const DiskOp& op, const std::string& path);

  mutable std::mutex mutex_;
  const DiskImage initial_;
  DiskImage live_;
  std::vector<DiskOp> log_;
  std::set<uint64_t> locks_;
  std::map<uint64_t, int> users_;
  std::vector<std::pair<std::string, std::string>> drops_;
  uint64_t dropped_ = 0;
};

// The name of the operation in logs and patterns.
const char* KindName(DiskOp::Kind kind);

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_MEMORY_DISK_H_
