// SPDX-License-Identifier: Apache-2.0
#include "layerwise/aligned_buffer.h"

#include <cerrno>
#include <cstdint>
#include <string>

namespace layerwise {

Status AlignedBuffer::Reserve(size_t n) {
  if (n <= size_) return Status::Ok();
  own_.reset();
  data_ = nullptr;
  size_ = 0;
  if (n > SIZE_MAX - kAlign) return Status::IoError(ENOMEM, "allocate a buffer", "");
  const size_t size = RoundUp(n, kAlign);
  own_.reset(static_cast<char*>(std::aligned_alloc(kAlign, size)));
  if (own_ == nullptr) {
    return Status::IoError(ENOMEM, "allocate a buffer of " + std::to_string(size) + " bytes", "");
  }
  data_ = own_.get();
  size_ = size;
  return Status::Ok();
}

}  // namespace layerwise
