// SPDX-License-Identifier: Apache-2.0
#include "layerwise/plan.h"

#include <algorithm>
#include <string>
#include <utility>

#include "layerwise/aligned_buffer.h"
#include "layerwise/mapped.h"

namespace layerwise {

namespace {

constexpr uint64_t kLargestOffset = INT64_MAX;
constexpr uint64_t kDefaultBlockBytes = 1 << 20;

Status BadBlock(size_t index, const Plan::Block& block, const std::string& what) {
  return Status::InvalidArgument("block " + std::to_string(index) + " (offset " +
                                 std::to_string(block.offset) + ", length " +
                                 std::to_string(block.length) + ") " + what);
}

Status BadSegment(size_t index, const Plan::Segment& segment, const std::string& what) {
  return Status::InvalidArgument(
      "segment " + std::to_string(index) + " (block " + std::to_string(segment.block) +
      ", offset in block " + std::to_string(segment.block_offset) + ", tensor " +
      std::to_string(segment.tensor) + ", offset in tensor " +
      std::to_string(segment.tensor_offset) + ", length " + std::to_string(segment.length) + ") " +
      what);
}

Status CheckBlocks(const std::vector<Plan::Block>& blocks) {
  uint64_t cursor = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Plan::Block& block = blocks[i];
    if (block.offset % kAlign != 0 || block.length % kAlign != 0) {
      return BadBlock(i, block, "is not a multiple of " + std::to_string(kAlign));
    }
    if (block.length == 0) return BadBlock(i, block, "is empty");
    if (block.offset > kLargestOffset || block.length > kLargestOffset - block.offset) {
      return BadBlock(i, block, "ends past the largest file offset");
    }
    if (block.offset < cursor) {
      return BadBlock(i, block, "begins before " + std::to_string(cursor) + ", the end of the one before");
    }
    cursor = block.offset + block.length;
  }
  return Status::Ok();
}

Status CheckSegments(const std::vector<Plan::Block>& blocks,
                     const std::vector<Plan::Segment>& segments, uint64_t tensors) {
  uint64_t block = 0;
  uint64_t cursor = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Plan::Segment& segment = segments[i];
    if (segment.block >= blocks.size()) return BadSegment(i, segment, "is in a block that the plan lacks");
    if (segment.tensor >= tensors) return BadSegment(i, segment, "names a tensor that the plan lacks");
    if (segment.length == 0) return BadSegment(i, segment, "is empty");
    if (segment.tensor_offset > kLargestOffset || segment.length > kLargestOffset - segment.tensor_offset) {
      return BadSegment(i, segment, "ends past the largest offset");
    }
    const uint64_t room = blocks[segment.block].length;
    if (segment.block_offset > room || segment.length > room - segment.block_offset) {
      return BadSegment(i, segment, "leaves its block of " + std::to_string(room) + " bytes");
    }
    if (segment.block < block) return BadSegment(i, segment, "comes after a segment of a later block");
    if (segment.block > block) {
      block = segment.block;
      cursor = 0;
    }
    if (segment.block_offset < cursor) return BadSegment(i, segment, "overlaps the one before, or is out of order");
    cursor = segment.block_offset + segment.length;
  }
  return Status::Ok();
}

}  // namespace

Status Plan::Create(std::vector<Block> blocks, std::vector<Segment> segments, uint64_t tensors,
                    uint64_t tail_offset, std::unique_ptr<Plan>* plan) {
  Status status = CheckBlocks(blocks);
  if (status.ok()) status = CheckSegments(blocks, segments, tensors);
  if (!status.ok()) return status;
  if (tail_offset % kAlign != 0 || tail_offset > kLargestOffset) {
    return Status::InvalidArgument("tail offset " + std::to_string(tail_offset) +
                                   " is not a multiple of " + std::to_string(kAlign));
  }
  std::unique_ptr<Plan> made(new Plan());
  made->tensors_ = tensors;
  made->end_ = tail_offset;
  made->block_bytes_ = blocks.empty() ? kDefaultBlockBytes : 0;
  for (const Block& block : blocks) {
    made->block_bytes_ = std::max(made->block_bytes_, block.length);
    made->end_ = std::max(made->end_, block.offset + block.length);
  }
  made->reach_.assign(tensors, 0);
  for (const Segment& segment : segments) {
    uint64_t& reach = made->reach_[segment.tensor];
    reach = std::max(reach, segment.tensor_offset + segment.length);
  }
  made->mapped_.reset(new std::atomic<uintptr_t>[tensors]());
  made->first_segment_.reserve(blocks.size() + 1);
  size_t next = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    made->first_segment_.push_back(next);
    while (next < segments.size() && segments[next].block == i) ++next;
  }
  made->first_segment_.push_back(next);
  made->blocks_ = std::move(blocks);
  made->segments_ = std::move(segments);
  *plan = std::move(made);
  return Status::Ok();
}

Status Plan::CheckAddress(size_t tensor, uintptr_t address) const {
  std::atomic<uintptr_t>& mapped = mapped_[tensor];
  if (address == mapped.load(std::memory_order_relaxed)) return Status::Ok();
  Status status = CheckMapped(address, reach_[tensor]);
  if (!status.ok()) return Status::InvalidArgument("tensor " + std::to_string(tensor) + ": " + status.message());
  mapped.store(address, std::memory_order_relaxed);
  return status;
}

std::span<const Plan::Segment> Plan::segments(size_t block) const {
  const size_t first = first_segment_[block];
  return std::span(segments_).subspan(first, first_segment_[block + 1] - first);
}

}  // namespace layerwise
