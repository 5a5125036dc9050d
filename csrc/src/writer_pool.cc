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

}  // namespace

void BlockSink::FinishBlock(size_t, const BlockWrite&, Status) {}

Status WriterPool::ProbeUring() { return layerwise::ProbeUring(); }

Status WriterPool::Create(const Options& options, std::unique_ptr<WriterPool>* pool) {
  if (options.depth < 1 || options.depth > 1024) {
    return Status::InvalidArgument("a writer pool has a depth of 1 to 1024, not " + std::to_string(options.depth));
  }
  auto core = options.backend == Backend::kUring ? MakeUringCore(options) : MakeThreadCore(options);
  Status status = core->Start();
  if (!status.ok()) {
    core->Close();
    return status;
  }
  pool->reset(new WriterPool(std::move(core), options));
  return Status::Ok();
}

WriterPool::WriterPool(std::unique_ptr<PoolCore> core, const Options& options)
    : core_(std::move(core)), backend_(options.backend), depth_(options.depth) {
  std::lock_guard lock(RegistryMutex());
  Registry().push_back(core_.get());
}

WriterPool::~WriterPool() {
  if (core_->forked()) {
    core_.release();
    return;
  }
  {
    std::lock_guard lock(RegistryMutex());
    std::erase(Registry(), core_.get());
  }
  core_->Close();
}

void WriterPool::Submit(BlockSink* sink, size_t first, size_t count) { core_->Submit(sink, first, count); }

size_t WriterPool::Withdraw(BlockSink* sink) { return core_->Withdraw(sink); }

void WriterPool::Close() { core_->Close(); }

void WriterPool::CloseAll() {
  std::lock_guard lock(RegistryMutex());
  for (PoolCore* core : Registry()) {
    if (!core->forked()) core->Close();
  }
}

}  // namespace layerwise
