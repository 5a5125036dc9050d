// SPDX-License-Identifier: Apache-2.0
#include <condition_variable>

#include "guarded.h"
#include "layerwise/calls.h"
#include "layerwise/hash.h"
#include "pool_core.h"

namespace layerwise {

namespace {

class ThreadCore final : public PoolCore {
 public:
  ThreadCore(int depth, Bounce bounce) : scratch_(CutBounce(bounce, depth)) {}

  Status Start() override {
    return StartThreads(static_cast<int>(scratch_.size()), [this](int i) { Work(&scratch_[static_cast<size_t>(i)]); });
  }

 private:
  void Wake(size_t blocks) override {
    if (blocks > 1) {
      work_.notify_all();
    } else {
      work_.notify_one();
    }
  }

  void Work(AlignedBuffer* scratch) {
    BlockWrite write;
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return closed() || !empty(); });
      if (empty()) return;
      const Job job = Pop();
      lock.unlock();
      Run(job, scratch, &write);
      lock.lock();
    }
  }

  static void Run(const Job& job, AlignedBuffer* scratch, BlockWrite* write) {
    write->runs.clear();
    write->hashed = false;
    bool started = true;
    Status status = Guarded([&] {
      started = job.sink->StartBlock(job.index, scratch, write);
      if (!started) return Status::Ok();
      if (!write->hashed) write->hash = Xxh3Runs(write->runs.data(), write->runs.size());
      const OngoingCall call("write", *write->path);
      return write->file->Pwritev(write->runs.data(), static_cast<int>(write->runs.size()), write->offset);
    });
    if (!started) return;
    job.sink->FinishBlock(job.index, *write, std::move(status));
  }

  std::vector<AlignedBuffer> scratch_;  // of each thread
  std::condition_variable work_;
};

}  // namespace

std::unique_ptr<PoolCore> MakeThreadCore(int depth, Bounce bounce) {
  return std::make_unique<ThreadCore>(depth, bounce);
}

}  // namespace layerwise
