// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_PAGE_CACHE_H_
#define LAYERWISE_SRC_PAGE_CACHE_H_

#include <cstdint>

namespace layerwise {

// How much of an open file of `size` bytes the page cache holds, 0 to 1, by a sample of its pages. 0 where the kernel
// does not tell this process. Reads nothing.
double CachedShare(int fd, uint64_t size);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_PAGE_CACHE_H_
