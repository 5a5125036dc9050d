#ifndef LAYERWISE_TESTING_DISK_IMAGE_H_
#define LAYERWISE_TESTING_DISK_IMAGE_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "layerwise/status.h"

namespace layerwise {

// A file system's content: files and directories by inode number.
struct DiskImage {
  static constexpr uint64_t kRoot = 1;

  struct Node {
    bool is_dir = false;
    std::string content;                      // of a file
    std::map<std::string, uint64_t> entries;  // of a directory: name to inode
  };

  DiskImage() { nodes[kRoot].is_dir = true; }

  std::map<uint64_t, Node> nodes;
  uint64_t next_inode = kRoot + 1;
};

// One thing that was done to a file system. Which fields count depends on `op`.
struct DiskOp {
  enum class Kind {
    kMakeDir,    // dir, name, inode
    kCreate,     // dir, name, inode
    kWrite,      // inode, offset, data
    kAllocate,   // inode, offset: the least size
    kTruncate,   // inode, offset: the size
    kSync,       // inode
    kRename,     // dir, name, to_dir, to_name, inode
    kUnlink,     // dir, name, inode
    kRemoveDir,  // dir, name, inode
    kSyncDir,    // inode
    kMark,       // text only
  };

  Kind kind = Kind::kMark;
  uint64_t inode = 0;
  uint64_t dir = 0;
  std::string name;
  uint64_t to_dir = 0;
  std::string to_name;
  uint64_t offset = 0;
  std::string data;
  std::string text;  // for people
};

// Does what the operation says, as a process sees it.
void Apply(const DiskOp& op, DiskImage* image);

// What a power failure leaves of operations that no flush covers.
enum class CrashPolicy {
  kNone,    // nothing
  kAll,     // everything
  kNames,   // all operations on directories, no data
  kData,    // all data, no operation on directories
  kRandom,  // any subset, drawn from the seed
};

Status ParsePolicy(std::string_view name, CrashPolicy* policy);

// What the disk may hold if power failed after these operations. Stricter than a
// real journal:
//  - data and size of a file are durable only by a later kSync of it;
//  - an entry of a directory is durable only by a later kSyncDir of the directory,
//    a rename between two directories only by one of each; kSync of a file does
//    not make its name durable;
//  - a rename happened or not, as a whole;
//  - with kRandom each 512-byte sector holds its old bytes or those of any later
//    write, each file has its old or its new size, and each operation on a
//    directory happened or not, all independently. Operations act on inodes, in
//    their order: a rename may survive whose create did not.
// What no name leads to is gone.
DiskImage AfterCrash(const DiskImage& initial, std::span<const DiskOp> ops, uint64_t seed, CrashPolicy policy);

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_DISK_IMAGE_H_
