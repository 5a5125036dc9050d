// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_MEMORY_DISK_H_
#define LAYERWISE_SRC_MEMORY_DISK_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>

#include "disk_image.h"
#include "layerwise/env.h"

namespace layerwise {

// What a direct file of a MemoryDisk demands.
inline constexpr DirectIoAlignment kMemoryAlignment = {512, 512};

// A file system in memory: the state that a MemoryDiskEnv and its open files share.
//
// Everything that changes it is a DiskOp and passes Do, where a subclass may note it, or
// leave it out.
//
// Threads: every call REQUIRES that the caller holds mutex(), but for mutex().
class MemoryDisk {
 public:
  // What is kept of direct files.
  enum class DirectFiles { kWhole, kSizeOnly };

  // A path taken apart: the directory that holds the name, and what the name
  // leads to (0 if nothing).
  struct Place {
    std::string path;  // absolute
    uint64_t dir = 0;  // 0 for the root itself
    std::string name;
    uint64_t inode = 0;
  };

  struct Counts {
    uint64_t files = 0;      // that were created or taken over
    uint64_t not_kept = 0;   // bytes that were dropped: their files keep only a size
    uint64_t syncs = 0;      // of files and directories, but for those of locks
  };

  explicit MemoryDisk(DirectFiles direct_files, DiskImage image = {})
      : direct_files_(direct_files), live_(std::move(image)) {}
  MemoryDisk(const MemoryDisk&) = delete;
  MemoryDisk& operator=(const MemoryDisk&) = delete;
  virtual ~MemoryDisk() = default;

  std::mutex& mutex() { return mutex_; }

  // ENOENT if the directory is missing, ENOTDIR if it is none.
  Status Find(const char* operation, const std::string& path, Place* place) const;
  // As Find; ENOENT too if the name leads nowhere.
  Status FindExisting(const char* operation, const std::string& path, Place* place) const;

  const DiskImage::Node& node(uint64_t inode) const { return live_.nodes.at(inode); }
  // Of files and directories, those without a name that are open included.
  size_t nodes() const { return live_.nodes.size(); }
  uint64_t NewInode() { return live_.next_inode++; }

  // Does the operation on what `path` named; `to` is the new path of a rename.
  void Do(const DiskOp& op, const std::string& path, const std::string& to = "");
  // The same for a write; what is not kept is not copied either.
  void Write(uint64_t inode, std::string_view data, uint64_t offset, const std::string& path);

  // A direct file begins, over whatever there was in it.
  void OpenDirect(uint64_t inode);

  Counts& counts() { return counts_; }
  std::set<uint64_t>& locks() { return locks_; }

  // Open files and locks of an inode.
  void AddUser(uint64_t inode) { ++users_[inode]; }
  void RemoveUser(uint64_t inode);
  bool InUse(uint64_t inode) const { return users_.contains(inode); }

  // Frees what no name leads to and nobody has open.
  void FreeIfGone(uint64_t inode);

 protected:
  // Right before an operation is done. False: it is not, and nobody is told.
  virtual bool Before(const DiskOp& /*op*/, const std::string& /*path*/, const std::string& /*to*/) { return true; }

 private:
  const DirectFiles direct_files_;
  std::mutex mutex_;
  DiskImage live_;
  Counts counts_;
  std::set<uint64_t> locks_;
  std::map<uint64_t, int> users_;  // none is 0
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_MEMORY_DISK_H_
