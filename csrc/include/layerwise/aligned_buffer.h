// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_ALIGNED_BUFFER_H_
#define LAYERWISE_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <utility>

#include "layerwise/status.h"

namespace layerwise {

// The alignment, in bytes, of every block of a shard and of all memory that the
// engine itself writes from or reads into. Direct I/O never demands more: see
// PosixEnv.
inline constexpr size_t kAlign = 4096;

inline constexpr size_t RoundUp(size_t value, size_t to) { return (value + to - 1) / to * to; }

// Memory aligned to kAlign; from 1 MiB on in huge pages where the kernel gives them. Threads: external synchronization.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Begins with n bytes that belong to someone else and outlive the buffer. REQUIRES:
  // data is aligned to kAlign.
  AlignedBuffer(char* data, size_t n) : data_(data), size_(n) {}
  AlignedBuffer(AlignedBuffer&& other) noexcept { *this = std::move(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    own_ = std::move(other.own_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  // Afterwards size() >= n. The content is undefined if the buffer had to grow, for
  // which it takes memory of its own. ENOMEM leaves the buffer empty.
  Status Reserve(size_t n);

  char* data() { return data_; }
  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  std::unique_ptr<char[], Free> own_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace layerwise

#endif  // LAYERWISE_ALIGNED_BUFFER_H_
