// SPDX-License-Identifier: Apache-2.0
#include "layerwise/shard_reader.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>

#include "deadline.h"
#include "guarded.h"
#include "layerwise/calls.h"
#include "layerwise/hash.h"
#include "layerwise/mapped.h"

namespace layerwise {

namespace {

// Of the file's pages. What is not there comes with the kernel's read-ahead.
constexpr double kMostly = 0.875;

Status Stuck(const char* operation, double seconds, const std::string& path) {
  char said[64];
  std::snprintf(said, sizeof(said), "%s: no answer for %g s", operation, seconds);
  return Status::IoError(ETIMEDOUT, said, path);
}

template <typename T>
struct Answer {
  std::mutex mutex;
  std::condition_variable given;
  bool there = false;
  Status status;
  T value;
};

// Has `action` done by an errand of the pool, with its result in *value, if the pool has
// less than endless patience. What `action` refers to must outlive a call that is stuck.
template <typename T>
Status Within(WriterPool* pool, const char* operation, const std::string& path,
              std::function<Status(T*)> action, T* value) {
  const auto answer = std::make_shared<Answer<T>>();
  if (pool->patience_s() >= kNoTimeout) {
    const OngoingCall call(operation, path);
    return action(value);
  }
  pool->Run([answer, action = std::move(action), operation, path](const Status& refused) {
    T made{};
    Status status = refused;
    if (refused.ok()) {
      const OngoingCall call(operation, path);
      status = Guarded([&] { return action(&made); });
    }
    std::lock_guard lock(answer->mutex);
    answer->there = true;
    answer->status = std::move(status);
    answer->value = std::move(made);
    answer->given.notify_all();
  });
  std::unique_lock lock(answer->mutex);
  const Deadline deadline = DeadlineAfter(pool->patience_s());
  if (!answer->given.wait_until(lock, deadline, [&] { return answer->there; })) {
    return Stuck(operation, pool->patience_s(), path);
  }
  *value = std::move(answer->value);
  return answer->status;
}

}  // namespace

// One call of ReadBlocks.
class ShardReader::Job final : public BlockSink, public std::enable_shared_from_this<ShardReader::Job> {
 public:
  Job(ShardReader* reader, const std::vector<Block>& blocks, const std::vector<Segment>& segments)
      : reader_(reader),
        kept_(reader->weak_from_this().lock()),
        blocks_(blocks),
        first_(blocks.size() + 1, 0),
        segments_(segments.size()) {
    for (const Segment& segment : segments) ++first_[segment.block + 1];
    for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    std::vector<size_t> next(first_.begin(), first_.end() - 1);
    for (const Segment& segment : segments) segments_[next[segment.block]++] = segment;
  }

  bool StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite*) override {
    bool bad = false;
    Status status = Guarded([&] { return failed() ? Status::Ok() : Check(index, scratch, &bad); });
    Done(index, status, bad);
    return false;
  }

  void FinishBlock(size_t index, const BlockWrite&, Status status) override { Done(index, status, false); }

  void CancelBlock(size_t index) override {
    const auto closed = [&] { return Status::IoError(ECANCELED, "read a block with a closed pool", reader_->path_); };
    Done(index, Guarded(closed), false);
  }

  Status Run(std::vector<size_t>* bad) {
    WriterPool* const pool = reader_->pool_;
    pending_ = blocks_.size();
    bad_.reserve(blocks_.size());  // the pool's threads need no memory
    pool->Submit(this, 0, blocks_.size());
    std::unique_lock lock(mutex_);
    while (pending_ > 0) {
      const size_t before = pending_;
      const Deadline deadline = DeadlineAfter(pool->patience_s());
      if (!changed_.wait_until(lock, deadline, [&] { return pending_ != before; })) return GiveUp(&lock);
    }
    std::sort(bad_.begin(), bad_.end());
    *bad = std::move(bad_);
    return status_;
  }

 private:
  // Nothing is copied to any destination from here on.
  Status GiveUp(std::unique_lock<std::mutex>* lock) {
    lock->unlock();
    const size_t withdrawn = reader_->pool_->Withdraw(this);
    lock->lock();
    pending_ -= withdrawn;
    // What is under way comes back here later: nothing may be thrown before it is kept.
    status_ = Guarded([this] { return Stuck("read", reader_->pool_->patience_s(), reader_->path_); });
    changed_.wait(*lock, [this] { return copying_ == 0; });
    if (pending_ > 0) self_ = shared_from_this();
    return status_;
  }

  Status Check(size_t index, AlignedBuffer* scratch, bool* bad) {
    const Block& block = blocks_[index];
    const uint64_t size = reader_->size();
    *bad = block.offset > size || block.length > size - block.offset;
    if (*bad) return Status::Ok();
    const char* data = nullptr;
    const bool cached = reader_->cached();
    Status status = Read(block, cached, scratch, &data, bad);
    // What is in memory may be wrong, or out of date, where the disk is sound.
    if (status.ok() && *bad && cached) status = Read(block, false, scratch, &data, bad);
    if (!status.ok() || *bad) return status;
    reader_->pool_->CountRead(block.length, cached);
    {
      std::lock_guard lock(mutex_);
      if (!status_.ok()) return Status::Ok();
      ++copying_;
    }
    for (size_t i = first_[index]; i < first_[index + 1]; ++i) {
      const Segment& segment = segments_[i];
      if (segment.length == 0) continue;  // of an empty block, which has no memory
      std::memcpy(reinterpret_cast<void*>(segment.address), data + segment.block_offset, segment.length);
    }
    std::lock_guard lock(mutex_);
    --copying_;
    changed_.notify_all();
    return Status::Ok();
  }

  Status Read(const Block& block, bool cached, AlignedBuffer* scratch, const char** data, bool* bad) {
    uint64_t got = 0;
    Status status = reader_->ReadRange(block.offset, block.length, cached, scratch, data, &got);
    *bad = status.ok() && (got != block.length || (block.hashed && Xxh3(*data, got) != block.hash));
    return status;
  }

  bool failed() {
    std::lock_guard lock(mutex_);
    return !status_.ok();
  }

  void Done(size_t index, const Status& status, bool bad) {
    std::shared_ptr<Job> last;  // goes once the lock is let go of
    std::lock_guard lock(mutex_);
    if (status_.ok()) status_ = status;
    if (bad) bad_.push_back(index);
    if (--pending_ == 0) last = std::move(self_);
    changed_.notify_all();
  }

  ShardReader* const reader_;
  const std::shared_ptr<ShardReader> kept_;
  const std::vector<Block> blocks_;
  std::vector<size_t> first_;  // of the segments of block i; one more entry than blocks
  std::vector<Segment> segments_;
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t pending_ = 0;
  size_t copying_ = 0;  // blocks that are being copied to their destinations
  Status status_;
  std::vector<size_t> bad_;
  std::shared_ptr<Job> self_;  // of one that was given up, while blocks are under way
};

Status ShardReader::Open(Env* env, WriterPool* pool, const std::string& path, bool direct,
                         std::unique_ptr<ShardReader>* reader) {
  const WriterPool::Reads reads = pool->reads();
  Opened opened;
  Status status = Within<Opened>(
      pool, "open", path,
      [env, path, direct, reads](Opened* made) {
        Status tried = env->NewReadableFile(path, direct && reads != WriterPool::Reads::kPlain, &made->file);
        const bool either = tried.ok() && made->file->direct() && reads == WriterPool::Reads::kAuto;
        if (either && made->file->Cached() >= kMostly) tried = env->NewReadableFile(path, false, &made->plain);
        return tried;
      },
      &opened);
  if (!status.ok()) return status;
  reader->reset(new ShardReader(env, pool, path, std::move(opened)));
  return Status::Ok();
}

ShardReader::ShardReader(Env* env, WriterPool* pool, std::string path, Opened opened)
    : env_(env),
      pool_(pool),
      path_(std::move(path)),
      file_(std::move(opened.file)),
      plain_(std::move(opened.plain)),
      cached_(plain_ != nullptr) {}

Status ShardReader::Plain(ReadableFile** file) {
  std::lock_guard lock(plain_mutex_);
  if (plain_ == nullptr) {
    Status status = env_->NewReadableFile(path_, false, &plain_);
    if (!status.ok()) return status;
  }
  *file = plain_.get();
  return Status::Ok();
}

Status ShardReader::ReadRange(uint64_t offset, uint64_t n, bool cached, AlignedBuffer* buffer, const char** data,
                              uint64_t* got) {
  *got = 0;
  n = offset < size() ? std::min(n, size() - offset) : 0;
  if (n == 0) return Status::Ok();
  ReadableFile* const file = cached ? plain_.get() : file_.get();
  const uint64_t align = file->alignment().offset;
  const uint64_t begin = offset / align * align;
  const uint64_t skipped = offset - begin;
  const size_t length = RoundUp(skipped + n, align);
  Status status = buffer->Reserve(length);
  if (!status.ok()) return status;
  const OngoingCall call("read", path_);
  size_t read = 0;
  status = file->Pread(buffer->data(), length, begin, &read);
  const bool refused = file->direct() && (status.error_number() == EINVAL || (status.ok() && read < skipped + n));
  if (refused) {
    ReadableFile* plain = nullptr;
    status = Plain(&plain);
    if (status.ok()) status = plain->Pread(buffer->data(), skipped + n, begin, &read);
  }
  if (!status.ok()) return status;
  *data = buffer->data() + skipped;
  *got = read > skipped ? std::min<uint64_t>(read - skipped, n) : 0;
  return Status::Ok();
}

Status ShardReader::Read(uint64_t offset, uint64_t n, std::string* data) {
  data->clear();
  return Within<std::string>(
      pool_, "read", path_,
      [this, kept = weak_from_this().lock(), offset, n](std::string* read) {
        AlignedBuffer buffer;
        const char* begin = nullptr;
        uint64_t got = 0;
        Status status = ReadRange(offset, n, false, &buffer, &begin, &got);
        if (status.ok() && got > 0) read->assign(begin, got);
        return status;
      },
      data);
}

Status ShardReader::ReadBlocks(const std::vector<Block>& blocks, const std::vector<Segment>& segments,
                               std::vector<size_t>* bad) {
  bad->clear();
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& segment = segments[i];
    const bool inside = segment.block < blocks.size() &&
                        segment.block_offset <= blocks[segment.block].length &&
                        segment.length <= blocks[segment.block].length - segment.block_offset;
    if (!inside || (segment.address == 0 && segment.length > 0)) {
      return Status::InvalidArgument("segment " + std::to_string(i) + " of a read of " + path_ +
                                     " leaves its block or has no address");
    }
    Status status = CheckMapped(segment.address, segment.length);
    if (!status.ok()) return Status::InvalidArgument("a read of " + path_ + " into " + status.message());
  }
  if (blocks.empty()) return Status::Ok();
  return std::make_shared<Job>(this, blocks, segments)->Run(bad);
}

}  // namespace layerwise
