#include "pool_core.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace layerwise {

namespace {

// Where all processors compute, hashing would take from a step what the step cannot wait for. A little lower only: with
// much less, a fence could wait for a thread that data loaders' workers leave no time. Where it is forbidden all goes on.
constexpr int kNice = 5;

void YieldToTraining() {
  const id_t thread = static_cast<id_t>(gettid());
  const int now = getpriority(PRIO_PROCESS, thread);
  static_cast<void>(setpriority(PRIO_PROCESS, thread, std::min(now + kNice, 19)));
}

}  // namespace

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
        YieldToTraining();
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

bool PoolCore::TakeLast(BlockSink* sink, size_t first, size_t count, size_t* index) {
  std::lock_guard lock(mutex_);
  for (size_t i = queue_.size(); i-- > 0;) {
    Range& range = queue_[i];
    if (range.sink != sink || range.next >= first + count || range.end <= first) continue;
    const size_t end = std::min(range.end, first + count);
    *index = end - 1;
    const Range behind{sink, end, range.end};
    range.end = end - 1;
    const auto at = queue_.begin() + static_cast<ptrdiff_t>(i);
    if (behind.next < behind.end) queue_.insert(at + 1, behind);
    if (queue_[i].next == queue_[i].end) queue_.erase(queue_.begin() + static_cast<ptrdiff_t>(i));
    return true;
  }
  return false;
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

std::vector<AlignedBuffer> CutBounce(Bounce bounce, int depth) {
  std::vector<AlignedBuffer> buffers(static_cast<size_t>(depth));
  const size_t size = bounce.size() / buffers.size();
  for (size_t i = 0; size > 0 && i < buffers.size(); ++i) buffers[i] = {bounce.data() + i * size, size};
  return buffers;
}

void PoolCore::Cancel(const Range& range) {
  for (size_t i = range.next; i < range.end; ++i) range.sink->CancelBlock(i);
}

}  // namespace layerwise
