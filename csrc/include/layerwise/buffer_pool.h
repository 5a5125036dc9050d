#ifndef LAYERWISE_BUFFER_POOL_H_
#define LAYERWISE_BUFFER_POOL_H_

#include <cstddef>
#include <memory>
#include <utility>

#include "layerwise/aligned_buffer.h"
#include "layerwise/status.h"

namespace layerwise {

// The one bounded pool of a process for memory on the way to disk: bounce buffers of
// a WriterPool, evacuated blocks, staged tensors. One anonymous mapping, cut into
// buffers first-fit; pages that were never used cost nothing.
//
// The rule that makes waiting for it safe: a buffer comes back when a local write is
// done, never when another rank has done something or a commit was decided. So a wait
// here lasts as long as the disk takes, and two ranks cannot wait for one another.
// Writing itself never waits here: a WriterPool takes its bounce buffers when it is
// made and keeps them, and evacuation only takes what is free.
//
// Threads: every method may be called by several threads at once. In a child made by
// fork only the destructors may be called; there they do nothing.
class BufferPool {
  class State;

 public:
  // Memory of the pool; empty if there was no room. Goes back with Release or with the
  // object. The mapping lives as long as a buffer of it.
  // Threads: external synchronization for one buffer.
  class Buffer {
   public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer() { Release(); }

    char* data() const { return data_; }  // aligned to kAlign; undefined content
    size_t size() const { return size_; }
    explicit operator bool() const { return data_ != nullptr; }
    void Release();  // idempotent

   private:
    friend class BufferPool;
    std::shared_ptr<State> state_;
    char* data_ = nullptr;
    size_t size_ = 0;
  };

  // InvalidArgument if bytes is 0; ENOMEM. The capacity is rounded up to kAlign.
  static Status Create(size_t bytes, std::shared_ptr<BufferPool>* pool);

  // A buffer of n bytes. REQUIRES: n > 0.
  Buffer TryAcquire(size_t n);
  // Waits for room as long as that takes, but not longer than the timeout. A buffer
  // larger than the pool is refused at once.
  Buffer Acquire(size_t n, double timeout_s);

  size_t capacity() const;
  size_t in_use() const;  // bytes, in units of kAlign
  size_t peak() const;    // the most that was ever in use

 private:
  explicit BufferPool(std::shared_ptr<State> state) : state_(std::move(state)) {}
  Buffer Wrap(char* data, size_t n);

  const std::shared_ptr<State> state_;
};

}  // namespace layerwise

#endif  // LAYERWISE_BUFFER_POOL_H_
