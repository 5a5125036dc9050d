#include "pool_core.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <system_error>

namespace layerwise {

PoolCore::PoolCore() : process_(getpid()) {}

bool PoolCore::forked() const { return getpid() != process_; }

Status PoolCore::StartThreads(int count, const std::function<void(int)>& work) {
  // Signals are for the threads that were there before.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  Status status;
  try {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([work, i] {
        pthread_setname_np(pthread_self(), "layerwise-io");
        work(i);
      });
    }
  } catch (const std::system_error& error) {
    status = Status::IoError(error.code().value(), "start a writer thread", "");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return status;
}

void PoolCore::Submit(BlockSink* sink, size_t first, size_t count) {
  if (count == 0) return;
  {
    std::lock_guard lock(mutex_);
    if (!closed_) {
      queue_.push_back({sink, first, first + count});
      Wake(count);
      return;
    }
  }
  Cancel({sink, first, first + count});
}

size_t PoolCore::Withdraw(BlockSink* sink) {
  std::lock_guard lock(mutex_);
  size_t count = 0;
  std::erase_if(queue_, [&](const Range& range) {
    if (range.sink != sink) return false;
    count += range.end - range.next;
    return true;
  });
  return count;
}

void PoolCore::Close() {
  std::deque<Range> cancelled;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    cancelled.swap(queue_);
    Wake(SIZE_MAX);
  }
  for (const Range& range : cancelled) Cancel(range);
  std::lock_guard lock(join_mutex_);
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

PoolCore::Job PoolCore::Pop() {
  Range& range = queue_.front();
  const Job job{range.sink, range.next++};
  if (range.next == range.end) queue_.pop_front();
  return job;
}

void PoolCore::Cancel(const Range& range) {
  for (size_t i = range.next; i < range.end; ++i) range.sink->CancelBlock(i);
}

}  // namespace layerwise
