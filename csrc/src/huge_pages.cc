// SPDX-License-Identifier: Apache-2.0
#include "layerwise/huge_pages.h"

#include <sys/mman.h>

#include <cerrno>

namespace layerwise {

namespace {

constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not have

}  // namespace

Status MakeHuge(uintptr_t address, size_t n, size_t* huge) {
  *huge = 0;
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + n) / kHugePage * kHugePage;
  for (uintptr_t page = begin; page < end; page += kHugePage) {
    void* const at = reinterpret_cast<void*>(page);
    // So that the kernel keeps it huge. It fails for memory that cannot be, as the next call does.
    static_cast<void>(madvise(at, kHugePage, MADV_HUGEPAGE));
    if (madvise(at, kHugePage, kCollapse) == 0) {
      *huge += kHugePage;
    } else if (errno == EINVAL && *huge == 0) {
      return Status::IoError(EINVAL, "madvise: collapse into huge pages", "");
    }
  }
  return Status::Ok();
}

}  // namespace layerwise
