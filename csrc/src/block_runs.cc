// SPDX-License-Identifier: Apache-2.0
#include "block_runs.h"

#include <algorithm>
#include <cstring>
#include <span>

namespace layerwise {

namespace {

// [begin, end) of the block lies at `address`.
struct Interior {
  uint64_t begin;
  uint64_t end;
  uintptr_t address;
};

uintptr_t AddressOf(const Plan::Segment& segment, Addresses addresses) {
  return addresses[segment.tensor].load(std::memory_order_relaxed) + segment.tensor_offset;
}

// The parts that need no copy.
std::vector<Interior> FindInteriors(std::span<const Plan::Segment> segments, Addresses addresses,
                                    DirectIoAlignment alignment) {
  // Blocks begin at multiples of kAlign, so an offset in the block stands for one in the file.
  const uint64_t unit = std::max(alignment.memory, alignment.offset);
  std::vector<Interior> interiors;
  for (const Plan::Segment& segment : segments) {
    const uintptr_t address = AddressOf(segment, addresses);
    if ((address - segment.block_offset) % alignment.memory != 0) continue;
    const uint64_t begin = RoundUp(segment.block_offset, unit);
    const uint64_t end = (segment.block_offset + segment.length) / unit * unit;
    if (begin < end) interiors.push_back({begin, end, address + (begin - segment.block_offset)});
  }
  return interiors;
}

// Leaves the largest, so few that there are at most kMostRuns with those in between.
void KeepLargest(std::vector<Interior>* interiors) {
  constexpr size_t kKept = (kMostRuns - 1) / 2;
  const auto kept = interiors->begin() + kKept;
  std::nth_element(interiors->begin(), kept, interiors->end(), [](const Interior& a, const Interior& b) {
    return a.end - a.begin > b.end - b.begin;
  });
  interiors->erase(kept, interiors->end());
  std::sort(interiors->begin(), interiors->end(),
            [](const Interior& a, const Interior& b) { return a.begin < b.begin; });
}

size_t CountRuns(const std::vector<Interior>& interiors, uint64_t length) {
  size_t runs = 0;
  uint64_t cursor = 0;
  for (const Interior& interior : interiors) {
    runs += interior.begin > cursor ? 2 : 1;
    cursor = interior.end;
  }
  return runs + (cursor < length ? 1 : 0);
}

// Copies [begin, end) of the block to out + begin. Called with ascending ranges;
// *next is the first segment that may reach into one.
uint64_t Copy(std::span<const Plan::Segment> segments, Addresses addresses, uint64_t begin, uint64_t end,
              size_t* next, char* out) {
  uint64_t copied = 0;
  uint64_t cursor = begin;
  for (; *next < segments.size(); ++*next) {
    const Plan::Segment& segment = segments[*next];
    const uint64_t from = std::max(segment.block_offset, begin);
    const uint64_t to = std::min(segment.block_offset + segment.length, end);
    if (from < to) {
      std::memset(out + cursor, 0, from - cursor);
      const auto* data = reinterpret_cast<const char*>(AddressOf(segment, addresses));
      std::memcpy(out + from, data + (from - segment.block_offset), to - from);
      cursor = to;
      copied += to - from;
    }
    if (segment.block_offset + segment.length > end) break;
  }
  std::memset(out + cursor, 0, end - cursor);
  return copied;
}

}  // namespace

Status CutBlock(const Plan& plan, size_t index, Addresses addresses, DirectIoAlignment alignment,
                AlignedBuffer* scratch, std::vector<iovec>* runs, uint64_t* copied) {
  const uint64_t length = plan.blocks()[index].length;
  const auto segments = plan.segments(index);
  std::vector<Interior> interiors = FindInteriors(segments, addresses, alignment);
  if (CountRuns(interiors, length) > kMostRuns) KeepLargest(&interiors);
  runs->clear();
  size_t next = 0;
  uint64_t cursor = 0;
  const auto bounce = [&](uint64_t end) -> Status {
    if (cursor == end) return Status::Ok();
    Status status = scratch->Reserve(plan.block_bytes());
    if (!status.ok()) return status;
    *copied += Copy(segments, addresses, cursor, end, &next, scratch->data());
    runs->push_back({scratch->data() + cursor, end - cursor});
    return status;
  };
  for (const Interior& interior : interiors) {
    Status status = bounce(interior.begin);
    if (!status.ok()) return status;
    runs->push_back({reinterpret_cast<void*>(interior.address), interior.end - interior.begin});
    cursor = interior.end;
  }
  return bounce(length);
}

uint64_t CopyBlock(const Plan& plan, size_t index, Addresses addresses, char* out) {
  size_t next = 0;
  return Copy(plan.segments(index), addresses, 0, plan.blocks()[index].length, &next, out);
}

}  // namespace layerwise
