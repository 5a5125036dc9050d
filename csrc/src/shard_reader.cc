#include "layerwise/shard_reader.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <utility>

#include "layerwise/hash.h"

namespace layerwise {

// One call of ReadBlocks.
class ShardReader::Job final : public BlockSink {
 public:
  Job(ShardReader* reader, const std::vector<Block>& blocks, const std::vector<Segment>& segments)
      : reader_(reader), blocks_(blocks), first_(blocks.size() + 1, 0), segments_(segments.size()) {
    for (const Segment& segment : segments) ++first_[segment.block + 1];
    for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
    std::vector<size_t> next(first_.begin(), first_.end() - 1);
    for (const Segment& segment : segments) segments_[next[segment.block]++] = &segment;
  }

  bool StartBlock(size_t index, AlignedBuffer* scratch, BlockWrite*) override {
    bool bad = false;
    Status status = failed() ? Status::Ok() : Check(index, scratch, &bad);
    Done(index, status, bad);
    return false;
  }

  void CancelBlock(size_t index) override {
    Done(index, Status::IoError(ECANCELED, "read a block with a closed pool", reader_->path_), false);
  }

  Status Run(std::vector<size_t>* bad) {
    pending_ = blocks_.size();
    reader_->pool_->Submit(this, 0, blocks_.size());
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    std::sort(bad_.begin(), bad_.end());
    *bad = std::move(bad_);
    return status_;
  }

 private:
  Status Check(size_t index, AlignedBuffer* scratch, bool* bad) {
    const Block& block = blocks_[index];
    const uint64_t size = reader_->size();
    *bad = block.offset > size || block.length > size - block.offset;
    if (*bad) return Status::Ok();
    const char* data = nullptr;
    uint64_t got = 0;
    Status status = reader_->ReadRange(block.offset, block.length, scratch, &data, &got);
    if (!status.ok()) return status;
    *bad = got != block.length || (block.hashed && Xxh3(data, got) != block.hash);
    if (*bad) return Status::Ok();
    for (size_t i = first_[index]; i < first_[index + 1]; ++i) {
      const Segment& segment = *segments_[i];
      std::memcpy(reinterpret_cast<void*>(segment.address), data + segment.block_offset, segment.length);
    }
    return Status::Ok();
  }

  bool failed() {
    std::lock_guard lock(mutex_);
    return !status_.ok();
  }

  void Done(size_t index, const Status& status, bool bad) {
    std::lock_guard lock(mutex_);
    if (status_.ok()) status_ = status;
    if (bad) bad_.push_back(index);
    if (--pending_ == 0) done_.notify_all();
  }

  ShardReader* const reader_;
  const std::vector<Block>& blocks_;
  std::vector<size_t> first_;  // of the segments of block i; one more entry than blocks
  std::vector<const Segment*> segments_;
  std::mutex mutex_;
  std::condition_variable done_;
  size_t pending_ = 0;
  Status status_;
  std::vector<size_t> bad_;
};

Status ShardReader::Open(Env* env, WriterPool* pool, const std::string& path, bool direct,
                         std::unique_ptr<ShardReader>* reader) {
  std::unique_ptr<ReadableFile> file;
  Status status = env->NewReadableFile(path, direct, &file);
  if (!status.ok()) return status;
  reader->reset(new ShardReader(env, pool, path, std::move(file)));
  return Status::Ok();
}

ShardReader::ShardReader(Env* env, WriterPool* pool, std::string path, std::unique_ptr<ReadableFile> file)
    : env_(env), pool_(pool), path_(std::move(path)), file_(std::move(file)) {}

Status ShardReader::Plain(ReadableFile** file) {
  std::lock_guard lock(plain_mutex_);
  if (plain_ == nullptr) {
    Status status = env_->NewReadableFile(path_, false, &plain_);
    if (!status.ok()) return status;
  }
  *file = plain_.get();
  return Status::Ok();
}

Status ShardReader::ReadRange(uint64_t offset, uint64_t n, AlignedBuffer* buffer, const char** data,
                              uint64_t* got) {
  *got = 0;
  n = offset < size() ? std::min(n, size() - offset) : 0;
  if (n == 0) return Status::Ok();
  const uint64_t align = file_->alignment().offset;
  const uint64_t begin = offset / align * align;
  const uint64_t skipped = offset - begin;
  const size_t length = RoundUp(skipped + n, align);
  Status status = buffer->Reserve(length);
  if (!status.ok()) return status;
  size_t read = 0;
  status = file_->Pread(buffer->data(), length, begin, &read);
  const bool refused = file_->direct() && (status.error_number() == EINVAL || (status.ok() && read < skipped + n));
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
  AlignedBuffer buffer;
  const char* begin = nullptr;
  uint64_t got = 0;
  Status status = ReadRange(offset, n, &buffer, &begin, &got);
  data->clear();
  if (status.ok() && got > 0) data->assign(begin, got);
  return status;
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
  }
  if (blocks.empty()) return Status::Ok();
  return Job(this, blocks, segments).Run(bad);
}

}  // namespace layerwise
