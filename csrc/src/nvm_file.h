// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_NVM_FILE_H_
#define LAYERWISE_SRC_NVM_FILE_H_

#include <mutex>
#include <string>
#include <vector>

#include "posix_file.h"

namespace layerwise {

// A file on persistent memory, written by the CPU through a mapping whose pages the
// file system keeps durable (MAP_SYNC): no copy in the page cache, no system call
// for a write into space that is allocated.
//
// Pwrite stores past the caches where it can and fences before it returns, so what
// is left to Sync is the file's size and space. Space is always allocated before it
// is written, since a store into a full file system would kill the process.
// Segments of the mapping stay until Close: threads write through them unlocked.
// Close takes no lock of the file's, so that a forked child may destroy one in use.
class NvmWritableFile final : public WritableFile {
 public:
  NvmWritableFile(std::string path, Descriptor fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  ~NvmWritableFile() override { static_cast<void>(Close()); }

  // Maps the beginning of the file; EOPNOTSUPP where there is no DAX. To be called
  // once, before anything else.
  Status Open();

  bool direct() const override { return true; }
  DirectIoAlignment alignment() const override { return {1, 1}; }
  Status Pwrite(const void* data, size_t n, uint64_t offset) override;
  Status Allocate(uint64_t size) override;
  Status Truncate(uint64_t size) override;
  Status Sync() override;
  Status Close() override;

 private:
  // Bytes [offset, offset + length) of the file, at `base`. The segments are
  // contiguous from 0; the last one may end past the end of the file.
  struct Segment {
    uint64_t offset;
    uint64_t length;
    char* base;
  };

  // These REQUIRE that mutex_ is held.
  uint64_t mapped() const;
  Status Map(uint64_t end);
  Status Reserve(uint64_t end);

  const std::string path_;
  Descriptor fd_;
  std::mutex mutex_;  // Pwrite against itself
  std::vector<Segment> segments_;
  uint64_t reserved_ = 0;  // so many bytes from the start have their space
  bool poisoned_ = false;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_NVM_FILE_H_
