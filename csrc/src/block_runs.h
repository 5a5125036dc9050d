// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_BLOCK_RUNS_H_
#define LAYERWISE_SRC_BLOCK_RUNS_H_

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "layerwise/aligned_buffer.h"
#include "layerwise/env.h"
#include "layerwise/plan.h"
#include "layerwise/status.h"

namespace layerwise {

// More runs than this are not put into one write.
inline constexpr size_t kMostRuns = 64;

// Where each tensor of a plan begins in memory.
using Addresses = const std::atomic<uintptr_t>*;

// Cuts a block into runs that a file with this alignment takes: the interior of each
// segment whose address is congruent to its place in the file, straight from the
// tensor's memory, and in between runs of `scratch`, to which the rest is copied with
// zeros under no segment. Where that would be more than kMostRuns runs, all but the
// largest interiors are copied too. Adds the bytes copied from tensors to *copied. ENOMEM
// if scratch must grow and can't.
Status CutBlock(const Plan& plan, size_t index, Addresses addresses, DirectIoAlignment alignment,
                AlignedBuffer* scratch, std::vector<iovec>* runs, uint64_t* copied);

// Copies the whole block, with zeros under no segment, to `out`. Returns the bytes
// that were copied from tensors.
uint64_t CopyBlock(const Plan& plan, size_t index, Addresses addresses, char* out);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_BLOCK_RUNS_H_
