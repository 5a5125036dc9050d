// SPDX-License-Identifier: Apache-2.0
#include "layerwise/shard_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "block_runs.h"
#include "deadline.h"
#include "guarded.h"
#include "layerwise/calls.h"
#include "layerwise/hash.h"

namespace layerwise {

namespace {

// For `count` more, so that adding them takes no memory; at least twice the room, as if they were added one by one.
template <typename T>
void MakeRoom(std::vector<T>* items, size_t count) {
  const size_t needed = items->size() + count;
  if (needed > items->capacity()) items->reserve(std::max(needed, 2 * items->capacity()));
}

}  // namespace

ShardWriter::ShardWriter(WriterPool* pool, std::shared_ptr<const Plan> plan, std::string path)
    : pool_(pool),
      plan_(std::move(plan)),
      path_(std::move(path)),
      process_(getpid()),
      addresses_(new std::atomic<uintptr_t>[plan_->tensors()]()),
      changed_(std::make_unique<std::condition_variable>()),
      states_(plan_->blocks().size(), BlockState::kNone),
      hashes_(plan_->blocks().size(), 0),
      times_(plan_->blocks().size()),
      end_(plan_->end()) {}

ShardWriter::~ShardWriter() {
  if (getpid() != process_) {
    // Waiters of the parent are recorded in it, and its destructor would wait for them.
    changed_.release();
    return;
  }
  Abort();
}

Status ShardWriter::SetAddress(size_t tensor, uintptr_t address) {
  if (tensor >= plan_->tensors()) {
    return Status::InvalidArgument("tensor " + std::to_string(tensor) + " of a plan with " +
                                   std::to_string(plan_->tensors()));
  }
  Status status = address == 0 ? Status::Ok() : plan_->CheckAddress(tensor, address);
  if (status.ok()) addresses_[tensor].store(address, std::memory_order_relaxed);
  return status;
}

Status ShardWriter::SetAddresses(const std::vector<uintptr_t>& addresses) {
  if (addresses.size() != plan_->tensors()) {
    return Status::InvalidArgument(std::to_string(addresses.size()) + " addresses for a plan with " +
                                   std::to_string(plan_->tensors()) + " tensors");
  }
  for (size_t i = 0; i < addresses.size(); ++i) {
    Status status = SetAddress(i, addresses[i]);
    if (!status.ok()) return status;
  }
  return Status::Ok();
}

Status ShardWriter::NoSuchBlocks(size_t first, size_t count) const {
  return Status::InvalidArgument("blocks " + std::to_string(first) + " + " + std::to_string(count) +
                                 " of a plan with " + std::to_string(plan_->blocks().size()));
}

Status ShardWriter::CheckSubmit(size_t first, size_t count) const {
  const size_t blocks = plan_->blocks().size();
  if (first > blocks || count > blocks - first) return NoSuchBlocks(first, count);
  for (size_t i = first; i < first + count; ++i) {
    if (states_[i] == BlockState::kPending) {
      return Status::FailedPrecondition("block " + std::to_string(i) + " of " + path_ +
                                        " is submitted again before it is complete");
    }
    for (const Plan::Segment& segment : plan_->segments(i)) {
      if (addresses_[segment.tensor].load(std::memory_order_relaxed) == 0) {
        return Status::FailedPrecondition("tensor " + std::to_string(segment.tensor) + " in block " +
                                          std::to_string(i) + " of " + path_ + " has no address");
      }
    }
  }
  return Status::Ok();
}

Status ShardWriter::Submit(size_t first, size_t count) { return Submit(first, count, BufferPool::Buffer()); }

Status ShardWriter::Submit(size_t first, size_t count, BufferPool::Buffer memory) {
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) return Status::Ok();
    if (state_ != State::kOpen) return Status::FailedPrecondition("blocks submitted after finish: " + path_);
    Status status = CheckSubmit(first, count);
    if (!status.ok()) return status;
    if (!memory) {
      counts_.leased += count;
    } else {
      Keep(first, count, std::make_shared<BufferPool::Buffer>(std::move(memory)));
    }
    std::fill_n(states_.begin() + static_cast<ptrdiff_t>(first), count, BlockState::kPending);
    counts_.submitted += count;
    counts_.pending += count;
  }
  pool_->Submit(this, first, count);
  return Status::Ok();
}

void ShardWriter::Keep(size_t first, size_t count, const std::shared_ptr<BufferPool::Buffer>& memory) {
  try {
    for (size_t i = first; i < first + count; ++i) kept_.emplace(i, memory);
  } catch (const std::bad_alloc&) {
    for (size_t i = first; i < first + count; ++i) kept_.erase(i);
    throw;
  }
}

Status ShardWriter::Append(std::string_view data, size_t* blocks) {
  *blocks = 0;
  if (data.empty()) return Status::Ok();
  if (plan_->end() == 0) {
    return Status::InvalidArgument("append to " + path_ + ": its plan has neither blocks nor a tail offset");
  }
  auto memory = std::make_shared<AlignedBuffer>();
  const size_t padded = RoundUp(data.size(), kAlign);
  Status status = memory->Reserve(padded);
  if (!status.ok()) return status;
  std::memcpy(memory->data(), data.data(), data.size());
  std::memset(memory->data() + data.size(), 0, padded - data.size());

  const size_t block_bytes = plan_->block_bytes();
  const size_t count = (padded + block_bytes - 1) / block_bytes;
  size_t first;
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) return Status::Ok();
    if (state_ != State::kOpen) return Status::FailedPrecondition("data appended after finish: " + path_);
    first = states_.size();
    // All memory first: what is added to one of these is added to all.
    MakeRoom(&tail_, count);
    MakeRoom(&states_, count);
    MakeRoom(&hashes_, count);
    for (size_t begin = 0; begin < padded; begin += block_bytes) {
      const size_t length = std::min(block_bytes, padded - begin);
      tail_.push_back({end_ + begin, length, memory->data() + begin, memory});
    }
    end_ += padded;
    states_.resize(first + count, BlockState::kPending);
    hashes_.resize(first + count, 0);
    counts_.submitted += count;
    counts_.pending += count;
    counts_.bytes_copied += data.size();
  }
  *blocks = count;
  pool_->Submit(this, first, count);
  return Status::Ok();
}

bool ShardWriter::StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite* write) {
  const size_t planned = plan_->blocks().size();
  write->file = file_.get();
  write->path = &path_;
  write->hashed = !hashing_;
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) {
      EndBlock(index, BlockState::kFailed);
      return false;
    }
    if (index >= planned) {
      StartTail(index, write);
      return true;
    }
    write->offset = plan_->blocks()[index].offset;
    write->length = plan_->blocks()[index].length;
    times_[index] = {MonotonicNs(), 0};
  }
  uint64_t copied = 0;
  Status status = CutBlock(*plan_, index, addresses_.get(), alignment_, scratch, &write->runs, &copied);
  std::lock_guard lock(mutex_);
  counts_.bytes_copied += copied;
  if (status.ok()) return true;
  if (error_.ok()) error_ = std::move(status);
  EndBlock(index, BlockState::kFailed);
  return false;
}

void ShardWriter::StartTail(size_t index, BlockWrite* write) const {
  const TailBlock& tail = tail_[index - plan_->blocks().size()];
  write->offset = tail.offset;
  write->length = tail.length;
  write->runs.push_back({const_cast<char*>(tail.data), tail.length});
}

void ShardWriter::FinishBlock(size_t index, const BlockWrite& write, Status status) {
  std::lock_guard lock(mutex_);
  if (status.ok()) {
    hashes_[index] = write.hash;
    counts_.completed += 1;
    counts_.bytes_written += write.length;
  } else if (error_.ok()) {
    error_ = status;
  }
  EndBlock(index, status.ok() ? BlockState::kComplete : BlockState::kFailed);
}

void ShardWriter::CancelBlock(size_t index) {
  Status closed = Guarded([&] { return Status::IoError(ECANCELED, "write a block to a closed pool", path_); });
  std::lock_guard lock(mutex_);
  if (error_.ok()) error_ = std::move(closed);
  EndBlock(index, BlockState::kFailed);
}

bool ShardWriter::Leased(size_t index) const {
  return index < plan_->blocks().size() && !evacuated_.contains(index) && !kept_.contains(index);
}

void ShardWriter::EndLease(size_t index) {
  counts_.leased -= 1;
  bool notify = counts_.leased == 0;
  for (Waiter* waiter : waiters_) {
    if (index < waiter->first || index >= waiter->end) continue;
    waiter->left -= 1;
    notify = notify || waiter->left == 0;
  }
  if (notify) changed_->notify_all();
}

void ShardWriter::EndBlock(size_t index, BlockState state) {
  const size_t planned = plan_->blocks().size();
  states_[index] = state;
  counts_.pending -= 1;
  if (index < planned) times_[index].ended = MonotonicNs();
  if (index >= planned) {
    tail_[index - planned].memory.reset();
  } else if (Leased(index)) {
    EndLease(index);
  } else {
    evacuated_.erase(index);
    kept_.erase(index);
  }
  if (counts_.pending == 0) changed_->notify_all();
}

bool ShardWriter::Wait(double timeout_s) {
  std::unique_lock lock(mutex_);
  return changed_->wait_until(lock, DeadlineAfter(timeout_s), [this] { return !making_ && counts_.pending == 0; });
}

bool ShardWriter::WaitLeases(double timeout_s) {
  std::unique_lock lock(mutex_);
  return changed_->wait_until(lock, DeadlineAfter(timeout_s), [this] { return counts_.leased == 0; });
}

ShardWriter::Counts ShardWriter::counts() const {
  std::lock_guard lock(mutex_);
  return counts_;
}

std::vector<ShardWriter::Times> ShardWriter::times() const {
  std::lock_guard lock(mutex_);
  return times_;
}

Status ShardWriter::error() const {
  std::lock_guard lock(mutex_);
  return error_;
}

Status ShardWriter::reuse_refused() const {
  std::lock_guard lock(mutex_);
  return reuse_refused_;
}

std::optional<uint64_t> ShardWriter::BlockHash(size_t index) const {
  std::lock_guard lock(mutex_);
  if (!hashing_ || index >= states_.size() || states_[index] != BlockState::kComplete) return std::nullopt;
  return hashes_[index];
}

Status ShardWriter::Hashes(std::vector<uint64_t>* hashes) const {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < states_.size(); ++i) {
    if (states_[i] != BlockState::kComplete) {
      return Status::FailedPrecondition("block " + std::to_string(i) + " of " + path_ + " is not complete");
    }
  }
  *hashes = hashing_ ? hashes_ : std::vector<uint64_t>();
  return Status::Ok();
}

Status ShardWriter::Poisoned() const {
  if (error_.error_number() == ECANCELED) return error_;
  return Status::IoError(EIO, "finish a file poisoned by an earlier failure (" + error_.message() + ")", path_);
}

Status ShardWriter::CheckFinish(std::string_view header) const {
  if (making_) return Status::FailedPrecondition("finish of " + path_ + " before it is made");
  if (header.empty() || header.size() % kAlign != 0) {
    return Status::InvalidArgument("a header of " + std::to_string(header.size()) +
                                   " bytes; expected a multiple of " + std::to_string(kAlign));
  }
  if (!states_.empty()) {
    const uint64_t data = plan_->blocks().empty() ? plan_->end() : plan_->blocks()[0].offset;
    if (header.size() > data) {
      return Status::InvalidArgument("a header of " + std::to_string(header.size()) +
                                     " bytes; the first block begins at " + std::to_string(data));
    }
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    if (states_[i] != BlockState::kComplete) {
      return Status::FailedPrecondition("finish of " + path_ + ": block " + std::to_string(i) +
                                        " is not complete");
    }
  }
  return Status::Ok();
}

Status ShardWriter::WriteHeader(std::string_view header) {
  AlignedBuffer buffer;
  Status status = buffer.Reserve(header.size());
  if (status.ok()) {
    std::memcpy(buffer.data(), header.data(), header.size());
    const OngoingCall call("write", path_);
    status = file_->Pwrite(buffer.data(), header.size(), 0);
  }
  if (status.ok() && reused_) {
    const OngoingCall call("truncate", path_);
    status = file_->Truncate(std::max<uint64_t>(end_, header.size()));
  }
  if (status.ok()) {
    const OngoingCall call("flush", path_);
    status = file_->Sync();
  }
  const Status closed = file_->Close();
  return status.ok() ? closed : status;
}

Status ShardWriter::Finish(std::string_view header) {
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) return Poisoned();
    if (state_ != State::kOpen) return Status::FailedPrecondition("finish called twice: " + path_);
    Status status = CheckFinish(header);
    if (!status.ok()) return status;
    state_ = State::kFinishing;
  }
  Status status = WriteHeader(header);
  std::lock_guard lock(mutex_);
  state_ = status.ok() ? State::kFinished : State::kClosed;
  error_ = status;
  if (status.ok()) counts_.bytes_written += header.size();
  changed_->notify_all();
  return status;
}

bool ShardWriter::Abort(double timeout_s) {
  if (getpid() != process_) return true;  // what is under way is the parent's
  const Deadline deadline = DeadlineAfter(timeout_s);
  std::unique_lock lock(mutex_);
  if (!changed_->wait_until(lock, deadline, [this] { return state_ != State::kFinishing; })) return false;
  if (state_ == State::kFinished) return true;
  if (error_.ok()) error_ = Guarded([this] { return Status::IoError(ECANCELED, "aborted", path_); });
  counts_.pending -= pool_->Withdraw(this) + pool_->Withdraw(&evacuated_sink_);
  if (counts_.pending == 0) changed_->notify_all();
  if (!changed_->wait_until(lock, deadline, [this] { return !making_ && counts_.pending == 0; })) return false;
  // Those that were withdrawn; nothing else is pending.
  std::replace(states_.begin(), states_.end(), BlockState::kPending, BlockState::kFailed);
  evacuated_.clear();
  kept_.clear();
  for (TailBlock& tail : tail_) tail.memory.reset();
  counts_.leased = 0;
  for (Waiter* waiter : waiters_) waiter->left = 0;
  changed_->notify_all();
  if (state_ == State::kOpen) {
    state_ = State::kClosed;
    lock.unlock();  // a close may take as long as a flush
    // Nothing relies on an aborted file, and an error of its close changes nothing.
    if (file_ != nullptr) {
      const OngoingCall call("close", path_);
      static_cast<void>(file_->Close());
    }
  }
  return true;
}

}  // namespace layerwise
