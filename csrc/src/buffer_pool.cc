// SPDX-License-Identifier: Apache-2.0
#include "layerwise/buffer_pool.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "deadline.h"

namespace layerwise {

class BufferPool::State {
 public:
  State(char* base, size_t capacity, uint64_t begin, bool attached, int wake)
      : process_(getpid()), base_(base), capacity_(capacity), begin_(begin), attached_(attached), wake_(wake) {
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
    PrepareReturn();
    if (!room_.wait_until(lock, deadline, [&] { return Cut(size, &offset); })) {
      returns_.pop_back();
      return nullptr;
    }
    in_use_ += size;
    peak_ = std::max(peak_, in_use_);
    return base_ + offset;
  }

  // nullptr if it is not all free.
  char* TakeAt(size_t offset, size_t n) {
    const size_t size = RoundUp(n, kAlign);
    std::lock_guard lock(mutex_);
    auto it = free_.upper_bound(offset);
    if (it == free_.begin()) return nullptr;
    --it;
    const size_t start = it->first;
    const size_t end = start + it->second;
    if (end < offset + size) return nullptr;
    PrepareReturn();
    if (offset + size < end) free_[offset + size] = end - offset - size;  // first: it may find no memory
    if (start < offset) {
      it->second = offset - start;
    } else {
      free_.erase(it);
    }
    in_use_ += size;
    peak_ = std::max(peak_, in_use_);
    return base_ + offset;
  }

  uint64_t PlaceOf(const char* data) const { return begin_ + static_cast<uint64_t>(data - base_); }
  uint64_t begin() const { return begin_; }

  // Takes no memory: buffers go back in destructors.
  void Give(char* data, size_t n) {
    size_t offset = static_cast<size_t>(data - base_);
    size_t size = RoundUp(n, kAlign);
    std::lock_guard lock(mutex_);
    if (attached_) returned_.push_back(PlaceOf(data));
    in_use_ -= size;
    auto range = std::move(returns_.back());
    returns_.pop_back();
    auto after = free_.lower_bound(offset);
    if (after != free_.end() && after->first == offset + size) {
      size += after->second;
      after = free_.erase(after);
    }
    const auto before = after == free_.begin() ? free_.end() : std::prev(after);
    if (before != free_.end() && before->first + before->second == offset) {
      before->second += size;
    } else {
      range.key() = offset;
      range.mapped() = size;
      free_.insert(std::move(range));
    }
    room_.notify_all();
    if (wake_ >= 0) static_cast<void>(eventfd_write(wake_, 1));
  }

  std::vector<uint64_t> TakeReturned() {
    std::lock_guard lock(mutex_);
    std::vector<uint64_t> places = returned_;
    returned_.clear();  // it keeps its room
    return places;
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
  // Takes the memory that the return of one more buffer needs. REQUIRES: mutex_ is held, here and below.
  void PrepareReturn() {
    const size_t needed = returned_.size() + returns_.size() + 1;
    if (attached_ && needed > returned_.capacity()) returned_.reserve(2 * needed);
    std::map<size_t, size_t> one{{0, 0}};
    returns_.push_back(one.extract(one.begin()));
  }

  bool Cut(size_t size, size_t* offset) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < size) continue;
      *offset = it->first;
      auto range = free_.extract(it);  // what is left of it goes back without memory
      range.key() += size;
      range.mapped() -= size;
      if (range.mapped() > 0) free_.insert(std::move(range));
      return true;
    }
    return false;
  }

  const int process_;
  char* const base_;
  const size_t capacity_;
  const uint64_t begin_;
  const bool attached_;
  const int wake_;
  mutable std::mutex mutex_;
  std::condition_variable room_;
  std::vector<uint64_t> returned_;
  std::map<size_t, size_t> free_;  // offset: length; neighbors are merged
  std::vector<std::map<size_t, size_t>::node_type> returns_;  // one for each buffer that is out, or more
  size_t in_use_ = 0;
  size_t peak_ = 0;
};

// In a forked child the mutex may be held, and waited on, by threads that it lacks.
struct BufferPool::Destroy {
  void operator()(State* state) const {
    if (!state->forked()) delete state;
  }
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
  std::shared_ptr<State> state(new State(static_cast<char*>(base), capacity, 0, false, -1), Destroy{});
  pool->reset(new BufferPool(std::move(state)));
  return Status::Ok();
}

Status BufferPool::CreateShared(int file, size_t bytes, uint64_t* begin, std::shared_ptr<BufferPool>* pool) {
  if (bytes == 0) return Status::InvalidArgument("a buffer pool of 0 bytes");
  const std::string what = "make a shared buffer pool of " + std::to_string(bytes) + " bytes";
  struct stat info {};
  if (fstat(file, &info) != 0) return Status::IoError(errno, what, "");
  const uint64_t end = RoundUp(static_cast<uint64_t>(info.st_size), kAlign);
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<off_t>::max()) - kAlign;
  if (bytes > kMost || end > kMost - bytes) return Status::IoError(ENOMEM, what, "");
  const size_t capacity = RoundUp(bytes, kAlign);
  int error = 0;
  do {
    error = fallocate(file, 0, static_cast<off_t>(end), static_cast<off_t>(capacity)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != 0) return Status::IoError(error == ENOSPC ? ENOMEM : error, what, "");
  if (fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK) != 0) return Status::IoError(errno, what, "");
  *begin = end;
  return Map(file, end, capacity, false, -1, what, pool);
}

Status BufferPool::Attach(int file, uint64_t begin, size_t bytes, int wake, std::shared_ptr<BufferPool>* pool) {
  const std::string what =
      "map the shared buffer pool of " + std::to_string(bytes) + " bytes at " + std::to_string(begin);
  struct stat info {};
  if (fstat(file, &info) != 0) return Status::IoError(errno, what, "");
  const auto size = static_cast<uint64_t>(info.st_size);
  if (bytes == 0 || bytes % kAlign != 0 || begin % kAlign != 0 || begin > size || bytes > size - begin) {
    return Status::InvalidArgument(what + ": the file has " + std::to_string(size));
  }
  const int seals = fcntl(file, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) return Status::InvalidArgument(what + ": it may be cut short");
  return Map(file, begin, bytes, true, wake, what, pool);
}

Status BufferPool::Map(int file, uint64_t begin, size_t capacity, bool attached, int wake, const std::string& what,
                       std::shared_ptr<BufferPool>* pool) {
  void* const base =
      mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, file, static_cast<off_t>(begin));
  if (base == MAP_FAILED) return Status::IoError(errno, what, "");
  // A worker that this process forks must not keep the memory when both sides are gone.
  if (madvise(base, capacity, MADV_DONTFORK) != 0) {
    const int error = errno;
    munmap(base, capacity);
    return Status::IoError(error, what, "");
  }
  std::shared_ptr<State> state(new State(static_cast<char*>(base), capacity, begin, attached, wake), Destroy{});
  pool->reset(new BufferPool(std::move(state)));
  return Status::Ok();
}

Status BufferPool::Adopt(uint64_t place, size_t n, Buffer* buffer) {
  const uint64_t begin = state_->begin();
  const size_t capacity = state_->capacity();
  char* data = nullptr;
  if (n > 0 && n <= capacity && place % kAlign == 0 && place >= begin && place - begin <= capacity - n) {
    data = state_->TakeAt(static_cast<size_t>(place - begin), n);
  }
  if (data == nullptr) {
    return Status::InvalidArgument("no free buffer of " + std::to_string(n) + " bytes at " + std::to_string(place) +
                                   " of a pool of " + std::to_string(capacity) + " at " + std::to_string(begin));
  }
  *buffer = Wrap(data, n);
  return Status::Ok();
}

std::vector<uint64_t> BufferPool::TakeReturned() { return state_->TakeReturned(); }

uint64_t BufferPool::Buffer::place() const { return state_->PlaceOf(data_); }

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
