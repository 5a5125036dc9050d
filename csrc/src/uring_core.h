// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_URING_CORE_H_
#define LAYERWISE_SRC_URING_CORE_H_

#include <memory>

#include "pool_core.h"

namespace layerwise {

// Whether this process may use io_uring with what the core below needs; if not, why.
Status ProbeUring();

// One thread with a ring of `depth` blocks: it starts writes while there is room,
// and hashes what it has started while the kernel writes. Files without a descriptor
// are written by their own calls.
//
// `bounce` is registered with the ring where the limit on locked memory allows that;
// leased memory never is: the kernel would go on writing a mapping's old pages after
// it was mapped anew.
std::unique_ptr<PoolCore> MakeUringCore(int depth, Bounce bounce);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_URING_CORE_H_
