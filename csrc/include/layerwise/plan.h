// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_PLAN_H_
#define LAYERWISE_PLAN_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "layerwise/status.h"

namespace layerwise {

// Maps the bytes of tensors to their places in a shard. Any thread may use it at any time.
// One plan serves the shards of many steps.
class Plan {
 public:
  // A range of the file that is hashed as one.
  struct Block {
    uint64_t offset;
    uint64_t length;
  };

  // `length` bytes of tensor `tensor`, from `tensor_offset` on, lie in block
  // `block` from `block_offset` on.
  struct Segment {
    uint64_t block;
    uint64_t block_offset;
    uint64_t tensor;
    uint64_t tensor_offset;
    uint64_t length;
  };

  // InvalidArgument, naming the first entry that is wrong, unless:
  //  - blocks ascend and do not overlap; offsets and lengths are multiples of
  //    kAlign, lengths are not 0, and every end fits a file offset;
  //  - segments ascend by (block, block_offset), lie inside their block, do not
  //    overlap, are not empty, and name a tensor below `tensors`;
  //  - `tail_offset` is a multiple of kAlign.
  // Bytes of a block under no segment are zeros.
  static Status Create(std::vector<Block> blocks, std::vector<Segment> segments, uint64_t tensors,
                       uint64_t tail_offset, std::unique_ptr<Plan>* plan);

  const std::vector<Block>& blocks() const { return blocks_; }
  std::span<const Segment> segments(size_t block) const;
  uint64_t tensors() const { return tensors_; }

  // Where data appended to the shard begins: the end of the last block, or
  // `tail_offset` if that is larger.
  uint64_t end() const { return end_; }
  // InvalidArgument unless what the segments have of a tensor is mapped memory if it
  // begins there. What was, once, is not asked for again: one plan serves many shards.
  Status CheckAddress(size_t tensor, uintptr_t address) const;

  // The length of the longest block; 1 MiB if there are none.
  uint64_t block_bytes() const { return block_bytes_; }

 private:
  Plan() = default;

  std::vector<Block> blocks_;
  std::vector<Segment> segments_;
  std::vector<size_t> first_segment_;  // of block i; one more entry than blocks
  uint64_t tensors_ = 0;
  std::vector<uint64_t> reach_;  // of each tensor: how far its segments go
  std::unique_ptr<std::atomic<uintptr_t>[]> mapped_;  // of each tensor: where it was found to be mapped
  uint64_t end_ = 0;
  uint64_t block_bytes_ = 0;
};

}  // namespace layerwise

#endif  // LAYERWISE_PLAN_H_
