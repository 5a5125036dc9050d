#include "layerwise/writer_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace layerwise {

class WriterPool::Core {
 public:
  Core() : process_(getpid()) {}

  Status Start(int threads) {
    // Signals are for the threads that were there before.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    Status status;
    try {
      for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
    } catch (const std::system_error& error) {
      status = Status::IoError(error.code().value(), "start a writer thread", "");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return status;
  }

  bool forked() const { return getpid() != process_; }

  void Submit(BlockSink* sink, size_t first, size_t count) {
    {
      std::lock_guard lock(mutex_);
      if (!closed_) {
        if (count > 0) queue_.push_back({sink, first, first + count});
        if (count > 1) {
          work_.notify_all();
        } else {
          work_.notify_one();
        }
        return;
      }
    }
    Cancel({sink, first, first + count});
  }

  size_t Withdraw(BlockSink* sink) {
    std::lock_guard lock(mutex_);
    size_t count = 0;
    std::erase_if(queue_, [&](const Range& range) {
      if (range.sink != sink) return false;
      count += range.end - range.next;
      return true;
    });
    return count;
  }

  void Close() {
    std::deque<Range> cancelled;
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
      cancelled.swap(queue_);
      work_.notify_all();
    }
    for (const Range& range : cancelled) Cancel(range);
    std::lock_guard lock(join_mutex_);
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  int threads() const { return static_cast<int>(threads_.size()); }

 private:
  struct Range {
    BlockSink* sink;
    size_t next;
    size_t end;
  };

  static void Cancel(const Range& range) {
    for (size_t i = range.next; i < range.end; ++i) range.sink->CancelBlock(i);
  }

  void Work() {
    pthread_setname_np(pthread_self(), "layerwise-io");
    AlignedBuffer scratch;
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      BlockSink* const sink = queue_.front().sink;
      const size_t index = queue_.front().next++;
      if (queue_.front().next == queue_.front().end) queue_.pop_front();
      lock.unlock();
      sink->RunBlock(index, &scratch);
      lock.lock();
    }
  }

  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<Range> queue_;
  bool closed_ = false;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;
};

namespace {

// Never destroyed: pools may outlive the destruction of statics at exit.
std::mutex& RegistryMutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

std::vector<WriterPool*>& Registry() {
  static auto* const pools = new std::vector<WriterPool*>;
  return *pools;
}

}  // namespace

Status WriterPool::Create(int threads, std::unique_ptr<WriterPool>* pool) {
  if (threads < 1 || threads > 1024) {
    return Status::InvalidArgument("a writer pool has 1 to 1024 threads, not " + std::to_string(threads));
  }
  auto core = std::make_unique<Core>();
  Status status = core->Start(threads);
  if (!status.ok()) {
    core->Close();
    return status;
  }
  pool->reset(new WriterPool(std::move(core)));
  return Status::Ok();
}

WriterPool::WriterPool(std::unique_ptr<Core> core) : core_(std::move(core)) {
  std::lock_guard lock(RegistryMutex());
  Registry().push_back(this);
}

WriterPool::~WriterPool() {
  if (core_->forked()) {
    core_.release();
    return;
  }
  {
    std::lock_guard lock(RegistryMutex());
    std::erase(Registry(), this);
  }
  core_->Close();
}

void WriterPool::Submit(BlockSink* sink, size_t first, size_t count) { core_->Submit(sink, first, count); }

size_t WriterPool::Withdraw(BlockSink* sink) { return core_->Withdraw(sink); }

void WriterPool::Close() { core_->Close(); }

int WriterPool::threads() const { return core_->threads(); }

void WriterPool::CloseAll() {
  std::lock_guard lock(RegistryMutex());
  for (WriterPool* pool : Registry()) {
    if (!pool->core_->forked()) pool->core_->Close();
  }
}

}  // namespace layerwise
