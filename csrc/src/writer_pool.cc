// SPDX-License-Identifier: Apache-2.0
#include "layerwise/writer_pool.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include "pool_core.h"
#include "uring_core.h"

namespace layerwise {

namespace {

// Never destroyed: pools may outlive the destruction of statics at exit.
std::mutex& RegistryMutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

std::vector<PoolCore*>& Registry() {
  static auto* const cores = new std::vector<PoolCore*>;
  return *cores;
}

// What threads that could not be ended go on using.
struct Left {
  std::unique_ptr<PoolCore> core;
  BufferPool::Buffer bounce;
};

void KeepForever(Left left) {
  static auto* const kept = new std::vector<Left>;
  std::lock_guard lock(RegistryMutex());
  kept->push_back(std::move(left));
}

}  // namespace

void BlockSink::FinishBlock(size_t, const BlockWrite&, Status) {}

Status WriterPool::ProbeUring() { return layerwise::ProbeUring(); }

Status WriterPool::Create(const Options& options, std::unique_ptr<WriterPool>* pool) {
  if (options.depth < 1 || options.depth > 1024) {
    return Status::InvalidArgument("a writer pool has a depth of 1 to 1024, not " + std::to_string(options.depth));
  }
  BufferPool::Buffer bounce;
  if (options.buffers != nullptr) {
    const size_t depth = static_cast<size_t>(options.depth);
    if (options.block_bytes == 0 || options.block_bytes % kAlign != 0 || options.block_bytes > SIZE_MAX / depth) {
      return Status::InvalidArgument("bounce buffers of " + std::to_string(options.block_bytes) +
                                     " bytes; expected a multiple of " + std::to_string(kAlign));
    }
    bounce = options.buffers->TryAcquire(depth * options.block_bytes);
    if (!bounce) {
      return Status::InvalidArgument(
          "the buffer pool (" + std::to_string(options.buffers->capacity()) + " bytes, " +
          std::to_string(options.buffers->in_use()) + " in use) has no room for " + std::to_string(depth) +
          " bounce buffers of " + std::to_string(options.block_bytes) + " bytes");
    }
  }
  std::unique_ptr<WriterPool> made(new WriterPool(options, std::move(bounce)));
  Status status = made->core_->Start();
  if (status.ok()) *pool = std::move(made);
  return status;
}

WriterPool::WriterPool(const Options& options, BufferPool::Buffer bounce)
    : buffers_(options.buffers),
      bounce_(std::move(bounce)),
      backend_(options.backend),
      depth_(options.depth),
      patience_s_(options.patience_s),
      reads_(options.reads),
      block_bytes_(bounce_ ? options.block_bytes : SIZE_MAX),
      core_(options.backend == Backend::kUring ? MakeUringCore(depth_, {bounce_.data(), bounce_.size()})
                                               : MakeThreadCore(depth_, {bounce_.data(), bounce_.size()})) {
  std::lock_guard lock(RegistryMutex());
  Registry().push_back(core_.get());
}

WriterPool::~WriterPool() {
  if (core_->forked()) {
    core_.release();
    return;
  }
  if (!core_->left()) core_->Close(DeadlineAfter(kNoTimeout));
  {
    std::lock_guard lock(RegistryMutex());
    std::erase(Registry(), core_.get());
  }
  if (core_->left()) KeepForever({std::move(core_), std::move(bounce_)});
}

void WriterPool::Submit(BlockSink* sink, size_t first, size_t count) { core_->Submit(sink, first, count); }

size_t WriterPool::Withdraw(BlockSink* sink) { return core_->Withdraw(sink); }

bool WriterPool::TakeLast(BlockSink* sink, size_t first, size_t count, size_t* index) {
  return core_->TakeLast(sink, first, count, index);
}

void WriterPool::Hold(BlockSink* sink) { core_->Hold(sink); }

void WriterPool::Release(BlockSink* sink) { core_->Release(sink); }

void WriterPool::Run(Errand errand) { core_->Errand(std::move(errand)); }

bool WriterPool::Close(double timeout_s) { return core_->forked() || core_->Close(DeadlineAfter(timeout_s)); }

bool WriterPool::CloseAll(double timeout_s) {
  const Deadline deadline = DeadlineAfter(timeout_s);
  bool all = true;
  std::lock_guard lock(RegistryMutex());
  for (PoolCore* core : Registry()) {
    if (!core->forked()) all = core->Close(core->left() ? DeadlineAfter(0) : deadline) && all;
  }
  return all;
}

}  // namespace layerwise
