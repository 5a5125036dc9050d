// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_POOL_CORE_H_
#define LAYERWISE_SRC_POOL_CORE_H_

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "deadline.h"
#include "layerwise/writer_pool.h"

namespace layerwise {

// The queue of a WriterPool and its threads; how they write blocks is the subclass's.
// Contracts: see WriterPool.
class PoolCore {
 public:
  PoolCore();
  // REQUIRES: closed, and not left.
  virtual ~PoolCore();
  PoolCore(const PoolCore&) = delete;
  PoolCore& operator=(const PoolCore&) = delete;

  // Starts the threads. After a failure only Close may be called.
  virtual Status Start() = 0;

  bool forked() const;
  void Submit(BlockSink* sink, size_t first, size_t count);
  size_t Withdraw(BlockSink* sink);
  bool TakeLast(BlockSink* sink, size_t first, size_t count, size_t* index);
  void Hold(BlockSink* sink);
  void Release(BlockSink* sink);
  void Errand(WriterPool::Errand errand);
  bool Close(Deadline deadline);
  // Whether a Close has left threads behind, which go on using this: it is never destroyed then.
  bool left() const;

 protected:
  struct Job {
    BlockSink* sink;
    size_t index;
  };

  Status StartThreads(int count, const std::function<void(int)>& work);

  // There is more in the queue, or the pool is closed. mutex_ is held.
  virtual void Wake(size_t blocks) = 0;

  // REQUIRES: mutex_ is held, and the queue is not empty.
  Job Pop();
  bool empty() const { return queue_.empty(); }
  bool closed() const { return closed_; }

  mutable std::mutex mutex_;

 private:
  struct Range {
    BlockSink* sink;
    size_t next;
    size_t end;
  };

  static void Cancel(const Range& range);
  static bool TakeLastOf(std::list<Range>* queue, BlockSink* sink, size_t first, size_t count, size_t* index);
  void RunErrands();

  const int process_;
  // Lists, whose members move without memory.
  std::list<Range> queue_;
  std::unordered_map<BlockSink*, std::list<Range>> held_;
  std::list<WriterPool::Errand> errands_;
  std::condition_variable errand_;
  bool runs_errands_ = false;
  bool closed_ = false;
  bool left_ = false;
  size_t running_ = 0;  // threads
  std::condition_variable ended_;
  std::mutex threads_mutex_;  // comes before mutex_
  std::vector<std::thread> threads_;
};

// `bounce`, which may be empty, is cut into one scratch buffer for each block in
// progress; it outlives the core.
using Bounce = std::span<char>;
std::vector<AlignedBuffer> CutBounce(Bounce bounce, int depth);

// `depth` threads; each writes, by the file's own calls, and hashes.
std::unique_ptr<PoolCore> MakeThreadCore(int depth, Bounce bounce);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_POOL_CORE_H_
