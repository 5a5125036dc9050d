#include "layerwise/buffer_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <map>
#include <mutex>
#include <string>

#include "deadline.h"

namespace layerwise {

class BufferPool::State {
 public:
  State(char* base, size_t capacity) : process_(getpid()), base_(base), capacity_(capacity) {
    free_[0] = capacity;
  }
  ~State() { munmap(base_, capacity_); }

  bool forked() const { return getpid() != process_; }
  size_t capacity() const { return capacity_; }

  // nullptr if there is no room by the deadline.
  char* Take(size_t n, Deadline deadline) {
    if (n > capacity_) return nullptr;
    const size_t size = RoundUp(n, kAlign);
    std::unique_lock lock(mutex_);
    size_t offset = 0;
    if (!room_.wait_until(lock, deadline, [&] { return Cut(size, &offset); })) return nullptr;
    in_use_ += size;
    peak_ = std::max(peak_, in_use_);
    return base_ + offset;
  }

  void Give(char* data, size_t n) {
    size_t offset = static_cast<size_t>(data - base_);
    size_t size = RoundUp(n, kAlign);
    std::lock_guard lock(mutex_);
    in_use_ -= size;
    auto after = free_.lower_bound(offset);
    if (after != free_.end() && after->first == offset + size) {
      size += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == offset) {
        offset = before->first;
        size += before->second;
      }
    }
    free_[offset] = size;
    room_.notify_all();
  }

  size_t in_use() const {
    std::lock_guard lock(mutex_);
    return in_use_;
  }

  size_t peak() const {
    std::lock_guard lock(mutex_);
    return peak_;
  }

 private:
  // REQUIRES: mutex_ is held.
  bool Cut(size_t size, size_t* offset) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < size) continue;
      *offset = it->first;
      const size_t left = it->second - size;
      free_.erase(it);
      if (left > 0) free_[*offset + size] = left;
      return true;
    }
    return false;
  }

  const int process_;
  char* const base_;
  const size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable room_;
  std::map<size_t, size_t> free_;  // offset: length; neighbours are merged
  size_t in_use_ = 0;
  size_t peak_ = 0;
};

BufferPool::Buffer& BufferPool::Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    Release();
    state_ = std::move(other.state_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void BufferPool::Buffer::Release() {
  char* const data = std::exchange(data_, nullptr);
  const size_t size = std::exchange(size_, 0);
  if (data != nullptr && !state_->forked()) state_->Give(data, size);
  state_.reset();
}

Status BufferPool::Create(size_t bytes, std::shared_ptr<BufferPool>* pool) {
  if (bytes == 0) return Status::InvalidArgument("a buffer pool of 0 bytes");
  const std::string what = "map a buffer pool of " + std::to_string(bytes) + " bytes";
  if (bytes > SIZE_MAX - kAlign) return Status::IoError(ENOMEM, what, "");
  const size_t capacity = RoundUp(bytes, kAlign);
  void* const base = mmap(nullptr, capacity, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return Status::IoError(errno, what, "");
  // In a forked child the mutex may be held, and waited on, by threads that it lacks.
  const auto destroy = [](State* state) {
    if (!state->forked()) delete state;
  };
  std::shared_ptr<State> state(new State(static_cast<char*>(base), capacity), destroy);
  pool->reset(new BufferPool(std::move(state)));
  return Status::Ok();
}

BufferPool::Buffer BufferPool::Wrap(char* data, size_t n) {
  Buffer buffer;
  if (data == nullptr) return buffer;
  buffer.state_ = state_;
  buffer.data_ = data;
  buffer.size_ = n;
  return buffer;
}

BufferPool::Buffer BufferPool::TryAcquire(size_t n) { return Acquire(n, 0); }

BufferPool::Buffer BufferPool::Acquire(size_t n, double timeout_s) {
  return Wrap(state_->Take(n, DeadlineAfter(timeout_s)), n);
}

size_t BufferPool::capacity() const { return state_->capacity(); }
size_t BufferPool::in_use() const { return state_->in_use(); }
size_t BufferPool::peak() const { return state_->peak(); }

}  // namespace layerwise
