// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_HUGE_PAGES_H_
#define LAYERWISE_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>

#include "layerwise/status.h"

namespace layerwise {

// The size of a huge page, in bytes.
inline constexpr size_t kHugePage = size_t{2} << 20;

// Asks the kernel to back the whole huge pages within [address, address + n) by huge
// pages: direct I/O then pins one page where it pinned 512. The content stays as it is,
// also under threads that use the memory meanwhile; what is not mapped, or is pinned by
// I/O just now, is left alone. *huge gets the bytes that are backed so afterwards.
// EINVAL where the kernel cannot (before Linux 6.1, or built without).
// Callable from any thread. May take milliseconds for each huge page.
Status MakeHuge(uintptr_t address, size_t n, size_t* huge);

}  // namespace layerwise

#endif  // LAYERWISE_HUGE_PAGES_H_
