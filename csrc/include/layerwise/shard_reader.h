// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SHARD_READER_H_
#define LAYERWISE_SHARD_READER_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "layerwise/env.h"
#include "layerwise/writer_pool.h"

namespace layerwise {

// Reads ranges of a shard, and copies out only what hashes as expected.
//
// A disk that does not answer within the pool's patience is ETIMEDOUT. What is still
// under way then writes to no destination; it keeps the reader, if that is shared, and
// needs env and pool, which must not be freed.
//
// Threads: every method may be called by several threads at once, but not from a
// thread of the pool.
class ShardReader : public std::enable_shared_from_this<ShardReader> {
 public:
  struct Block {
    uint64_t offset;
    uint64_t length;
    uint64_t hash;
    bool hashed = true;  // false: nothing is known of its content
  };

  // Copy `length` bytes from `block_offset` of block `block` to `address`.
  struct Segment {
    uint64_t block;
    uint64_t block_offset;
    uintptr_t address;
    uint64_t length;
  };

  // `direct` says whether reads may go past the page cache; the pool, whether they do.
  // REQUIRES: env and pool outlive the reader.
  static Status Open(Env* env, WriterPool* pool, const std::string& path, bool direct,
                     std::unique_ptr<ShardReader>* reader);

  // Bytes, when the shard was opened.
  uint64_t size() const { return file_->size(); }

  // Whether blocks are taken out of the page cache, which held most of the file when it
  // was opened. One that then hashes otherwise is read once more, from the disk.
  bool cached() const { return cached_; }

  // Up to n bytes from offset on; fewer only at the end of the file.
  Status Read(uint64_t offset, uint64_t n, std::string* data);

  // Reads every block on the pool's threads and checks its hash. *bad gets the
  // indices, in order, of blocks that hash otherwise or reach past the end of the
  // file; of such a block nothing is copied. On an I/O error the destinations
  // are undefined.
  // InvalidArgument, before anything is read, if a segment leaves its block or goes where
  // there is no memory.
  // REQUIRES: destinations do not overlap and stay mapped until this returns.
  Status ReadBlocks(const std::vector<Block>& blocks, const std::vector<Segment>& segments,
                    std::vector<size_t>* bad);

 private:
  class Job;

  struct Opened {
    std::unique_ptr<ReadableFile> file, plain;
  };

  ShardReader(Env* env, WriterPool* pool, std::string path, Opened opened);

  // Reads [offset, offset + n) or up to the end of the file, with `cached` through the
  // page cache. *data points into the buffer.
  Status ReadRange(uint64_t offset, uint64_t n, bool cached, AlignedBuffer* buffer, const char** data,
                   uint64_t* got);
  // The file without direct I/O, for what direct I/O refuses; opened when needed.
  Status Plain(ReadableFile** file);

  Env* const env_;
  WriterPool* const pool_;
  const std::string path_;
  const std::unique_ptr<ReadableFile> file_;
  std::mutex plain_mutex_;
  std::unique_ptr<ReadableFile> plain_;
  const bool cached_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SHARD_READER_H_
