// SPDX-License-Identifier: Apache-2.0
#include "pool_core.h"

#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "guarded.h"
#include "signals_blocked.h"

namespace layerwise {

namespace {

// Where all processors compute, hashing would take from a step what the step cannot wait
// for. A little lower only: with much less, a fence could wait for a thread that data
// loaders' workers leave no time. Where it is forbidden all goes on.
constexpr int kNice = 5;

void YieldToTraining() {
  const id_t thread = static_cast<id_t>(gettid());
  const int now = getpriority(PRIO_PROCESS, thread);
  static_cast<void>(setpriority(PRIO_PROCESS, thread, std::min(now + kNice, 19)));
}

Status Closed() {
  return Guarded([] { return Status::IoError(ECANCELED, "use of a closed pool", ""); });
}

}  // namespace

PoolCore::PoolCore() : process_(getpid()) {}

PoolCore::~PoolCore() {
  // One that was just being started when Close looked: it has found nothing to do.
  for (std::thread& thread : threads_) thread.join();
}

bool PoolCore::forked() const { return getpid() != process_; }

Status PoolCore::StartThreads(int count, const std::function<void(int)>& work) {
  std::lock_guard lock(threads_mutex_);
  const SignalsBlocked blocked;
  const auto count_threads = [this](int more) {
    std::lock_guard counting(mutex_);
    running_ += static_cast<size_t>(more);
    ended_.notify_all();
  };
  try {
    for (int i = 0; i < count; ++i) {
      count_threads(1);
      threads_.emplace_back([count_threads, work, i] {
        pthread_setname_np(pthread_self(), "layerwise-io");
        YieldToTraining();
        work(i);
        count_threads(-1);
      });
    }
  } catch (const std::system_error& error) {
    count_threads(-1);
    return Guarded([&] { return Status::IoError(error.code().value(), "start a writer thread", ""); });
  } catch (const std::bad_alloc&) {
    count_threads(-1);
    return Status::NoMemory();
  }
  return Status::Ok();
}

void PoolCore::Submit(BlockSink* sink, size_t first, size_t count) {
  if (count == 0) return;
  std::list<Range> added;
  Status status = Guarded([&] {
    added.push_back({sink, first, first + count});
    return Status::Ok();
  });
  if (!status.ok()) {
    for (size_t i = first; i < first + count; ++i) sink->FinishBlock(i, BlockWrite(), status);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    if (!closed_) {
      const auto held = held_.find(sink);
      if (held != held_.end()) {
        held->second.splice(held->second.end(), added);
        return;
      }
      queue_.splice(queue_.end(), added);
      Wake(count);
      return;
    }
  }
  Cancel(added.front());
}

void PoolCore::Hold(BlockSink* sink) {
  std::lock_guard lock(mutex_);
  if (!closed_) held_[sink];
}

void PoolCore::Release(BlockSink* sink) {
  std::lock_guard lock(mutex_);
  const auto held = held_.find(sink);
  if (held == held_.end()) return;
  size_t blocks = 0;
  for (const Range& range : held->second) blocks += range.end - range.next;
  queue_.splice(queue_.end(), held->second);
  held_.erase(held);
  if (blocks > 0) Wake(blocks);
}

size_t PoolCore::Withdraw(BlockSink* sink) {
  std::lock_guard lock(mutex_);
  size_t count = 0;
  queue_.remove_if([&](const Range& range) {
    if (range.sink != sink) return false;
    count += range.end - range.next;
    return true;
  });
  const auto held = held_.find(sink);
  if (held != held_.end()) {
    for (const Range& range : held->second) count += range.end - range.next;
    held->second.clear();
  }
  return count;
}

bool PoolCore::TakeLast(BlockSink* sink, size_t first, size_t count, size_t* index) {
  std::lock_guard lock(mutex_);
  const auto held = held_.find(sink);
  return TakeLastOf(held == held_.end() ? &queue_ : &held->second, sink, first, count, index);
}

bool PoolCore::TakeLastOf(std::list<Range>* queue, BlockSink* sink, size_t first, size_t count, size_t* index) {
  for (auto at = queue->end(); at != queue->begin();) {
    Range& range = *--at;
    if (range.sink != sink || range.next >= first + count || range.end <= first) continue;
    const size_t end = std::min(range.end, first + count);
    if (end < range.end) queue->insert(std::next(at), {sink, end, range.end});
    *index = end - 1;
    range.end = end - 1;
    if (range.next == range.end) queue->erase(at);
    return true;
  }
  return false;
}

void PoolCore::Errand(WriterPool::Errand errand) {
  // From here on nothing throws: an errand that is queued is done or refused, and its caller is not told otherwise.
  std::list<WriterPool::Errand> added;
  added.push_back(std::move(errand));
  bool start = false;
  {
    std::lock_guard lock(mutex_);
    if (!closed_) {
      errands_.splice(errands_.end(), added);
      start = !std::exchange(runs_errands_, true);
    }
    errand_.notify_one();
  }
  if (!added.empty()) return added.front()(Closed());
  if (!start) return;
  const Status status = StartThreads(1, [this](int) { RunErrands(); });
  if (status.ok()) return;
  std::list<WriterPool::Errand> refused;
  {
    std::lock_guard lock(mutex_);
    runs_errands_ = false;
    refused.swap(errands_);
  }
  for (const auto& each : refused) each(status);
}

void PoolCore::RunErrands() {
  std::unique_lock lock(mutex_);
  for (;;) {
    errand_.wait(lock, [this] { return closed_ || !errands_.empty(); });
    if (errands_.empty()) return;
    auto errand = std::move(errands_.front());
    errands_.pop_front();
    lock.unlock();
    errand(Status::Ok());
    errand = nullptr;  // what it kept may call the pool when it goes
    lock.lock();
  }
}

bool PoolCore::Close(Deadline deadline) {
  std::list<Range> cancelled;
  std::list<WriterPool::Errand> errands;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    cancelled.swap(queue_);
    for (auto& [sink, ranges] : held_) cancelled.splice(cancelled.end(), ranges);
    held_.clear();
    errands.swap(errands_);
    Wake(SIZE_MAX);
    errand_.notify_all();
  }
  for (const auto& errand : errands) errand(Closed());
  for (const Range& range : cancelled) Cancel(range);
  std::lock_guard threads(threads_mutex_);
  {
    std::unique_lock lock(mutex_);
    const bool ended = ended_.wait_until(lock, deadline, [this] { return running_ == 0; });
    left_ = left_ || !ended;
  }
  for (std::thread& thread : threads_) {
    if (left_) {
      thread.detach();
    } else {
      thread.join();
    }
  }
  threads_.clear();
  std::lock_guard lock(mutex_);
  return running_ == 0;
}

bool PoolCore::left() const {
  std::lock_guard lock(mutex_);
  return left_;
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
