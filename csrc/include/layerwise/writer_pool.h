// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_WRITER_POOL_H_
#define LAYERWISE_WRITER_POOL_H_

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "layerwise/aligned_buffer.h"
#include "layerwise/buffer_pool.h"
#include "layerwise/env.h"
#include "layerwise/status.h"

namespace layerwise {

// One block on its way to a file.
struct BlockWrite {
  WritableFile* file = nullptr;
  const std::string* path = nullptr;  // for errors
  uint64_t offset = 0;
  uint64_t length = 0;
  // The block's bytes in order; each run is aligned as the file demands.
  std::vector<iovec> runs;
  // Whether `hash` is not the pool's to fill in: it is known, or nobody wants it.
  bool hashed = false;
  uint64_t hash = 0;
};

class PoolCore;

// Seconds: longer than any process lives.
inline constexpr double kNoTimeout = 1e9;

// What a WriterPool works on: numbered blocks. Every call is made on a thread of the
// pool, except as said.
class BlockSink {
 public:
  virtual ~BlockSink() = default;

  // Begins a block. Either processes it wholly and returns false, or fills *write in
  // and returns true: the pool then writes the runs, hashes them unless `hashed`,
  // and calls FinishBlock. *write comes empty. `scratch` belongs to the block until
  // it is finished; its content is undefined. Runs may lie in it. May throw
  // std::bad_alloc, before anything else has happened: FinishBlock is told.
  virtual bool StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite* write) = 0;

  // The block is written *and* hashed, or `status` says why it is not. The pool does
  // not touch the runs' memory any more, nor does the kernel.
  virtual void FinishBlock(size_t index, const BlockWrite& write, Status status);

  // Called instead of StartBlock, on any thread, when the pool closes.
  virtual void CancelBlock(size_t index) = 0;
};

// What does the I/O and the hashing of all shards of a process, `depth` blocks at a
// time. Blocks are started in the order in which they were submitted.
//
// With kPosix, `depth` threads each take a block, hash it and write it. With kUring,
// one thread keeps `depth` writes with the kernel by io_uring and hashes meanwhile;
// a file without a descriptor (WritableFile::descriptor) is written by its own calls,
// and a sink that works in StartBlock, as a reader does, gets no parallelism.
//
// Threads: every method may be called by several threads at once, but not from a
// sink's methods.
//
// In a child made by fork the pool has no threads: there, nothing of it may be
// called but the destructor, which then does nothing.
class WriterPool {
 public:
  enum class Backend { kPosix, kUring };

  // How ShardReaders read. kAuto: through the page cache where it holds most of the file,
  // else as kDirect, which is past it where the file system allows that.
  enum class Reads { kDirect, kAuto, kPlain };

  // Of blocks that ShardReaders have read, in bytes. `cached`: of these, from files that
  // kAuto took out of the page cache.
  struct ReadCounts {
    uint64_t read = 0;
    uint64_t cached = 0;
  };

  struct Options {
    Backend backend = Backend::kPosix;
    int depth = 4;  // blocks in progress at once, 1 to 1024
    // Where bounce buffers and evacuated blocks come from; without it, bounce buffers
    // are memory of the pool's own, and nothing can be evacuated.
    std::shared_ptr<BufferPool> buffers = nullptr;
    // Of `buffers`, depth * block_bytes are taken at once and kept, so that a shard
    // whose blocks are no longer than this never waits for memory.
    size_t block_bytes = 1 << 20;
    // Seconds after which a ShardReader takes the disk for stuck: of an opening, or
    // without a block that has come.
    double patience_s = kNoTimeout;
    Reads reads = Reads::kDirect;
  };

  // Whether kUring is to be had here; if not, the errno and the call that say why.
  // Containers and kernels often forbid it.
  static Status ProbeUring();

  // InvalidArgument also if `buffers` has no room for the bounce buffers. If kUring is
  // refused: what ProbeUring says.
  static Status Create(const Options& options, std::unique_ptr<WriterPool>* pool);

  // Close(), as long as that takes, unless one has not ended in time.
  // REQUIRES: no sink is used by another thread any more.
  ~WriterPool();

  WriterPool(const WriterPool&) = delete;
  WriterPool& operator=(const WriterPool&) = delete;

  // Queues blocks first .. first + count - 1 and returns at once. Each will get
  // exactly one call of StartBlock or CancelBlock, unless it is taken back. In a
  // closed pool the calls of CancelBlock come before this returns.
  // REQUIRES: the sink lives until the last block is finished or cancelled.
  void Submit(BlockSink* sink, size_t first, size_t count);

  // Takes the sink's blocks that have not been started back out of the queue; no
  // call is made for them. Returns how many. Does not wait for started ones.
  size_t Withdraw(BlockSink* sink);

  // Takes one of blocks first .. first + count - 1 of the sink back, the last of those
  // that have not been started; false if all have been. No call is made for it.
  bool TakeLast(BlockSink* sink, size_t first, size_t count, size_t* index);

  // From here until Release, blocks of the sink wait: they can be taken back, and are
  // cancelled by Close, but are not started.
  void Hold(BlockSink* sink);
  void Release(BlockSink* sink);

  // What is done beside blocks, one after the other, on a thread that is there for
  // nothing else. It is called with OK, or, if it is not to be done, with the reason,
  // maybe before this returns.
  using Errand = std::function<void(const Status&)>;
  void Run(Errand errand);

  // Cancels what is queued, waits for what is running, ends the threads. Idempotent.
  //
  // False if that takes longer: a call to the operating system does not return. Its
  // thread is left to itself then, and what it uses of the pool is never freed. What
  // else it uses must not be either: its sink, and the memory under the block.
  bool Close(double timeout_s = kNoTimeout);

  Backend backend() const { return backend_; }
  int depth() const { return depth_; }
  double patience_s() const { return patience_s_; }
  Reads reads() const { return reads_; }
  ReadCounts read_counts() const { return {read_.load(), cached_.load()}; }
  void CountRead(uint64_t n, bool cached) {
    read_ += n;
    if (cached) cached_ += n;
  }
  // nullptr if it was made without.
  BufferPool* buffers() const { return buffers_.get(); }
  // The longest block that fits a bounce buffer; SIZE_MAX without `buffers`.
  size_t block_bytes() const { return block_bytes_; }

  // Closes every pool of the process: for the interpreter's exit, so that no
  // thread reads memory that is about to be freed. For those that could not be closed
  // before it does not wait again. Whether all are closed.
  static bool CloseAll(double timeout_s = kNoTimeout);

 private:
  WriterPool(const Options& options, BufferPool::Buffer bounce);

  const std::shared_ptr<BufferPool> buffers_;
  BufferPool::Buffer bounce_;
  const Backend backend_;
  const int depth_;
  const double patience_s_;
  const Reads reads_;
  const size_t block_bytes_;
  std::atomic<uint64_t> read_{0};
  std::atomic<uint64_t> cached_{0};
  std::unique_ptr<PoolCore> core_;
};

}  // namespace layerwise

#endif  // LAYERWISE_WRITER_POOL_H_
