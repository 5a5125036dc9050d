// SPDX-License-Identifier: Apache-2.0
// ShardWriter's evacuation: blocks that were not started are copied away and written from the copy.

#include <algorithm>
#include <utility>

#include "block_runs.h"
#include "deadline.h"
#include "guarded.h"
#include "layerwise/hash.h"
#include "layerwise/shard_writer.h"

namespace layerwise {

Status ShardWriter::Evacuate(size_t first, size_t count, double timeout_s, bool* safe) {
  *safe = false;
  const Deadline deadline = DeadlineAfter(timeout_s);
  const size_t blocks = plan_->blocks().size();
  if (first > blocks || count > blocks - first) return NoSuchBlocks(first, count);
  {
    std::lock_guard lock(mutex_);
    for (const auto& [index, memory] : kept_) {
      if (index - first >= count) continue;
      return Status::FailedPrecondition("block " + std::to_string(index) + " of " + path_ +
                                        " has memory of its own and is not evacuated");
    }
  }
  EvacuateQueued(first, count);
  std::unique_lock lock(mutex_);
  Waiter waiter{first, first + count, 0};
  for (size_t i = first; i < first + count; ++i) {
    if (states_[i] == BlockState::kPending && Leased(i)) waiter.left += 1;
  }
  waiters_.push_back(&waiter);
  *safe = changed_->wait_until(lock, deadline, [&] { return waiter.left == 0; });
  std::erase(waiters_, &waiter);
  return Status::Ok();
}

void ShardWriter::EvacuateQueued(size_t first, size_t count) {
  BufferPool* const buffers = pool_->buffers();
  if (buffers == nullptr) return;
  for (;;) {
    // Room first: a block that was taken back must not lose its place for nothing.
    BufferPool::Buffer memory = buffers->TryAcquire(plan_->block_bytes());
    size_t index = 0;
    if (!memory || !pool_->TakeLast(this, first, count, &index)) return;
    const uint64_t copied = CopyBlock(*plan_, index, addresses_.get(), memory.data());
    Status status = Guarded([&] {
      Requeue(index, std::move(memory), copied);
      return Status::Ok();
    });
    // It is in no queue any more.
    if (!status.ok()) return FinishBlock(index, BlockWrite(), std::move(status));
  }
}

void ShardWriter::Requeue(size_t index, BufferPool::Buffer memory, uint64_t copied) {
  const uint64_t hash = hashing_ ? Xxh3(memory.data(), plan_->blocks()[index].length) : 0;
  {
    std::lock_guard lock(mutex_);
    if (!error_.ok()) return EndBlock(index, BlockState::kFailed);
    evacuated_.insert_or_assign(index, Evacuated{std::move(memory), hash});
    counts_.bytes_copied += copied;
    counts_.bytes_evacuated += copied;
    EndLease(index);
  }
  pool_->Submit(&evacuated_sink_, index, 1);
}

bool ShardWriter::StartEvacuated(size_t index, BlockWrite* write) {
  std::lock_guard lock(mutex_);
  if (!error_.ok()) {
    EndBlock(index, BlockState::kFailed);
    return false;
  }
  times_[index] = {MonotonicNs(), 0};
  const Plan::Block& block = plan_->blocks()[index];
  const Evacuated& copy = evacuated_.at(index);
  write->file = file_.get();
  write->path = &path_;
  write->offset = block.offset;
  write->length = block.length;
  write->runs.push_back({copy.memory.data(), block.length});
  write->hashed = true;
  write->hash = copy.hash;
  return true;
}

bool ShardWriter::EvacuatedSink::StartBlock(size_t index, AlignedBuffer*, BlockWrite* write) {
  return writer_->StartEvacuated(index, write);
}

void ShardWriter::EvacuatedSink::FinishBlock(size_t index, const BlockWrite& write, Status status) {
  writer_->FinishBlock(index, write, std::move(status));
}

void ShardWriter::EvacuatedSink::CancelBlock(size_t index) { writer_->CancelBlock(index); }

}  // namespace layerwise
