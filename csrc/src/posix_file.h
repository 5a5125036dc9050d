// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_POSIX_FILE_H_
#define LAYERWISE_SRC_POSIX_FILE_H_

#include <optional>
#include <string>

#include "descriptor.h"
#include "layerwise/env.h"
#include "page_cache.h"
#include "roots.h"

namespace layerwise {

Status PosixError(const char* operation, const std::string& path);

// Whether the range ends within the largest offset that a file may have.
bool FitsKernel(size_t n, uint64_t offset);

// Creates a file that must not exist, with exactly this mode. `path` is for the error, here and below.
Status CreateExclusive(const Place& place, const std::string& path, uint32_t mode, Descriptor* fd);

// Opens what is a regular file, and nothing else; `flags` are open(2)'s.
Status OpenRegular(const char* operation, const Place& place, const std::string& path, int flags, Descriptor* fd,
                   struct stat* info);

// Makes a directory with exactly this mode, and opens it (O_PATH).
Status MakeExactly(const Place& place, const std::string& path, uint32_t mode, Descriptor* made);

// Creates a file for trials in this directory, and unlinks it again. If `direct` is
// given, it is what TurnDirect says while the file still has its name: a server of
// FUSE may find it by that only.
Status CreateProbe(Roots& roots, const std::string& dir, std::string* path, Descriptor* fd,
                   std::optional<DirectIoAlignment>* direct = nullptr);

// Env::ReuseFile, up to the open descriptor, which is not direct.
Status TakeOver(Roots& roots, const std::string& from, const std::string& to, uint32_t mode, Descriptor* fd);

// Switches an open file to direct I/O and says what that demands; nullopt, and no
// change, where the file system refuses it, also in an open, or demands more than
// kAlign.
std::optional<DirectIoAlignment> TurnDirect(int fd);

// Writes all n bytes; see WritableFile::Pwrite. `path` is for the error.
Status WriteAll(int fd, const void* data, size_t n, uint64_t offset, const std::string& path);

Status TruncateTo(int fd, uint64_t size, const std::string& path);

// Reads until n bytes or the end of the file; see ReadableFile::Pread.
Status ReadAll(int fd, void* data, size_t n, uint64_t offset, uint32_t align, const std::string& path,
               size_t* got);

class PosixWritableFile final : public WritableFile {
 public:
  PosixWritableFile(std::string path, Descriptor fd, std::optional<DirectIoAlignment> alignment)
      : path_(std::move(path)), fd_(std::move(fd)), alignment_(alignment) {}

  bool direct() const override { return alignment_.has_value(); }
  DirectIoAlignment alignment() const override { return alignment_.value_or(DirectIoAlignment{}); }
  Status Pwrite(const void* data, size_t n, uint64_t offset) override;
  Status Pwritev(const iovec* pieces, int count, uint64_t offset) override;
  int descriptor() const override { return fd_.get(); }
  Status Allocate(uint64_t size) override;
  Status Truncate(uint64_t size) override;
  Status Sync() override;
  Status Close() override { return fd_.Close(path_); }

 private:
  const std::string path_;
  Descriptor fd_;
  const std::optional<DirectIoAlignment> alignment_;
  bool poisoned_ = false;
};

class PosixReadableFile final : public ReadableFile {
 public:
  PosixReadableFile(std::string path, Descriptor fd, uint64_t size,
                    std::optional<DirectIoAlignment> alignment)
      : path_(std::move(path)), fd_(std::move(fd)), size_(size), alignment_(alignment) {}

  uint64_t size() const override { return size_; }
  bool direct() const override { return alignment_.has_value(); }
  DirectIoAlignment alignment() const override { return alignment_.value_or(DirectIoAlignment{}); }
  Status Pread(void* data, size_t n, uint64_t offset, size_t* got) override;
  double Cached() override { return CachedShare(fd_.get(), size_); }
  Status Close() override { return fd_.Close(path_); }

 private:
  const std::string path_;
  Descriptor fd_;
  const uint64_t size_;
  const std::optional<DirectIoAlignment> alignment_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_POSIX_FILE_H_
