// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_BUFFER_POOL_H_
#define LAYERWISE_BUFFER_POOL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

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
// Shared. A pool may lie in a memory file (memfd_create) instead, which two processes
// map: what one stages, the other writes. One side, the owner (CreateShared), hands
// buffers out; it passes on where one begins, and keeps it. The other (Attach) takes
// up what it is handed (Adopt), and learns which of those are released (TakeReturned),
// to tell the owner. So neither side trusts memory that the other may change for
// anything but content. The file has no name, and goes with the last process that has
// it.
//
// Threads: every method may be called by several threads at once. In a child made by
// fork only the destructors may be called; there they do nothing. Shared memory is not
// mapped there.
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
    uint64_t place() const;  // in the memory file of a shared pool, else in the pool. REQUIRES: not empty
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

  // Lays a pool after what the memory file `file` holds; several pools may lie in one.
  // The memory is taken at once, so that no later touch can fail for want of it, and
  // the file sealed, so that neither side can cut it short under the other. The
  // descriptor stays the caller's. *begin: where the pool begins in the file.
  // As Create; EINVAL for what is no memory file that may be sealed.
  static Status CreateShared(int file, size_t bytes, uint64_t* begin, std::shared_ptr<BufferPool>* pool);

  // The other side of a pool that begins at `begin` and has `bytes` bytes. Whenever a
  // buffer is released, the eventfd `wake` is counted up, unless it is -1. Both
  // descriptors stay the caller's, `wake` as long as there are buffers.
  // InvalidArgument for what the file does not hold, or for a file that may be cut
  // short.
  static Status Attach(int file, uint64_t begin, size_t bytes, int wake, std::shared_ptr<BufferPool>* pool);

  // The buffer of n bytes at `place`. InvalidArgument unless it lies wholly in the pool, on a
  // multiple of kAlign, and is not taken.
  Status Adopt(uint64_t place, size_t n, Buffer* buffer);

  // Of an attached pool: the places of the buffers that were released since the last
  // call.
  std::vector<uint64_t> TakeReturned();

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
  static Status Map(int file, uint64_t begin, size_t capacity, bool attached, int wake, const std::string& what,
                    std::shared_ptr<BufferPool>* pool);
  struct Destroy;

  const std::shared_ptr<State> state_;
};

}  // namespace layerwise

#endif  // LAYERWISE_BUFFER_POOL_H_
