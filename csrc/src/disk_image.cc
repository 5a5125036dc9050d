// SPDX-License-Identifier: Apache-2.0
#include "disk_image.h"

#include <algorithm>

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

void EraseEntry(DiskImage* image, uint64_t dir, const std::string& name, uint64_t inode) {
  auto& entries = image->nodes[dir].entries;
  const auto entry = entries.find(name);
  if (entry == entries.end() || entry->second != inode) return;
  entries.erase(entry);
  --image->nodes[inode].links;
}

void PutEntry(DiskImage* image, uint64_t dir, const std::string& name, uint64_t inode) {
  uint64_t& entry = image->nodes[dir].entries[name];
  if (entry != 0) --image->nodes[entry].links;
  entry = inode;
  ++image->nodes[inode].links;
}

}  // namespace

void ApplyToContent(const DiskOp& op, std::string* content) {
  if (op.kind == Kind::kTruncate) {
    content->resize(op.offset);
  } else if (op.kind == Kind::kAllocate) {
    content->resize(std::max<size_t>(content->size(), op.offset));
  } else {
    content->resize(std::max<size_t>(content->size(), op.offset + op.data.size()));
    content->replace(op.offset, op.data.size(), op.data);
  }
}

void ApplyToNames(const DiskOp& op, DiskImage* image) {
  switch (op.kind) {
    case Kind::kMakeDir:
    case Kind::kCreate:
      PutEntry(image, op.dir, op.name, op.inode);
      break;
    case Kind::kRename:
      EraseEntry(image, op.dir, op.name, op.inode);
      PutEntry(image, op.to_dir, op.to_name, op.inode);
      break;
    default:
      EraseEntry(image, op.dir, op.name, op.inode);
  }
}

void Apply(const DiskOp& op, DiskImage* image) {
  switch (op.kind) {
    case Kind::kMakeDir:
    case Kind::kCreate:
      image->nodes[op.inode].is_dir = op.kind == Kind::kMakeDir;
      image->next_inode = std::max(image->next_inode, op.inode + 1);
      ApplyToNames(op, image);
      break;
    case Kind::kRename:
    case Kind::kUnlink:
    case Kind::kRemoveDir:
      ApplyToNames(op, image);
      break;
    case Kind::kWrite:
    case Kind::kAllocate:
    case Kind::kTruncate: {
      DiskImage::Node& node = image->nodes[op.inode];
      if (!node.size_only) {
        ApplyToContent(op, &node.content);
      } else if (op.kind == Kind::kTruncate) {
        node.size_only = op.offset;
      } else {
        node.size_only = std::max(*node.size_only, op.offset + op.data.size());
      }
      break;
    }
    default:
      break;
  }
}

}  // namespace layerwise
