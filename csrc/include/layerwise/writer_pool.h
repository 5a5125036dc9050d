#ifndef LAYERWISE_WRITER_POOL_H_
#define LAYERWISE_WRITER_POOL_H_

#include <cstddef>
#include <memory>

#include "layerwise/aligned_buffer.h"
#include "layerwise/status.h"

namespace layerwise {

// What a WriterPool works on: numbered blocks.
class BlockSink {
 public:
  virtual ~BlockSink() = default;

  // Processes one block, on a thread of the pool. `scratch` belongs to that
  // thread and keeps its size from call to call; its content is undefined.
  virtual void RunBlock(size_t index, AlignedBuffer* scratch) = 0;

  // Called instead of RunBlock, on any thread, when the pool closes.
  virtual void CancelBlock(size_t index) = 0;
};

// The threads that do the I/O and the hashing of all shards of a process. Blocks
// are started in the order in which they were submitted.
//
// Threads: every method may be called by several threads at once, but not from
// RunBlock or CancelBlock.
//
// In a child made by fork the pool has no threads: there, nothing of it may be
// called but the destructor, which then does nothing.
class WriterPool {
 public:
  // REQUIRES: 1 <= threads <= 1024.
  static Status Create(int threads, std::unique_ptr<WriterPool>* pool);

  // Close(). REQUIRES: no sink is used by another thread any more.
  ~WriterPool();

  WriterPool(const WriterPool&) = delete;
  WriterPool& operator=(const WriterPool&) = delete;

  // Queues blocks first .. first + count - 1 and returns at once. Each will get
  // exactly one call of RunBlock or CancelBlock, unless Withdraw takes it back.
  // In a closed pool the calls of CancelBlock come before this returns.
  // REQUIRES: the sink lives until then.
  void Submit(BlockSink* sink, size_t first, size_t count);

  // Takes the sink's blocks that have not been started back out of the queue; no
  // call is made for them. Returns how many. Does not wait for started ones.
  size_t Withdraw(BlockSink* sink);

  // Cancels what is queued, waits for what is running, joins the threads.
  // Idempotent.
  void Close();

  int threads() const;

  // Closes every pool of the process: for the interpreter's exit, so that no
  // thread reads memory that is about to be freed.
  static void CloseAll();

 private:
  class Core;

  explicit WriterPool(std::unique_ptr<Core> core);

  std::unique_ptr<Core> core_;
};

}  // namespace layerwise

#endif  // LAYERWISE_WRITER_POOL_H_
