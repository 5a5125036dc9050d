// SPDX-License-Identifier: Apache-2.0
#include "layerwise/aligned_buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <string>

#include "layerwise/huge_pages.h"

namespace layerwise {

namespace {

// Direct I/O pins one huge page where it would pin 256 small ones, and hands the device one piece of memory.
constexpr size_t kHugeFrom = size_t{1} << 20;

}  // namespace

Status AlignedBuffer::Reserve(size_t n) {
  if (n <= size_) return Status::Ok();
  own_.reset();
  data_ = nullptr;
  size_ = 0;
  if (n > SIZE_MAX - kAlign) return Status::IoError(ENOMEM, "allocate a buffer", "");
  const bool huge = n >= kHugeFrom && n <= SIZE_MAX - kHugePage;
  const size_t align = huge ? kHugePage : kAlign;
  const size_t size = RoundUp(n, align);
  own_.reset(static_cast<char*>(std::aligned_alloc(align, size)));
  if (own_ == nullptr) {
    return Status::IoError(ENOMEM, "allocate a buffer of " + std::to_string(size) + " bytes", "");
  }
  // Before anything is in it. Where the kernel has no huge pages all stays as it is.
  if (huge) static_cast<void>(madvise(own_.get(), size, MADV_HUGEPAGE));
  data_ = own_.get();
  size_ = size;
  return Status::Ok();
}

}  // namespace layerwise
