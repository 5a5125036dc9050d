// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_DISK_IMAGE_H_
#define LAYERWISE_SRC_DISK_IMAGE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace layerwise {

// A file system's content: files and directories by inode number.
struct DiskImage {
  static constexpr uint64_t kRoot = 1;

  struct Node {
    bool is_dir = false;
    std::string content;                      // of a file
    std::optional<uint64_t> size_only;        // of a file whose content is not kept: its size
    std::map<std::string, uint64_t> entries;  // of a directory: name to inode
    uint64_t links = 0;                       // how many entries lead here

    uint64_t size() const { return size_only.value_or(content.size()); }
  };

  DiskImage() { nodes[kRoot].is_dir = true; }

  std::map<uint64_t, Node> nodes;
  uint64_t next_inode = kRoot + 1;
};

// One thing that is done to a file system. Which fields count depends on `kind`.
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
    kMark,       // nothing: a place in a log
  };

  Kind kind = Kind::kMark;
  uint64_t inode = 0;
  uint64_t dir = 0;
  std::string name;
  uint64_t to_dir = 0;
  std::string to_name;
  uint64_t offset = 0;
  std::string data;
};

// Does what the operation says, as a process sees it.
void Apply(const DiskOp& op, DiskImage* image);

// The two halves of that: what it does to the content of its file (kWrite, kAllocate,
// kTruncate), and to names (kMakeDir, kCreate, kRename, kUnlink, kRemoveDir). A name that
// leads elsewhere by now is not removed.
void ApplyToContent(const DiskOp& op, std::string* content);
void ApplyToNames(const DiskOp& op, DiskImage* image);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_DISK_IMAGE_H_
