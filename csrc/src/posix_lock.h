// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_POSIX_LOCK_H_
#define LAYERWISE_SRC_POSIX_LOCK_H_

#include <memory>
#include <string>
#include <utility>

#include "layerwise/env.h"
#include "posix_file.h"

namespace layerwise {

// A lock that lives as long as any copy of its descriptor; forked children close theirs at once. Acquire takes an
// open-file-description lock (fcntl), Hold one of flock(2); a shared one needs no right to write.
class PosixFileLock final : public FileLock {
 public:
  // REQUIRES: `roots` outlives the lock.
  static Status Acquire(Roots& roots, const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock);

  static Status Hold(Roots& roots, const std::string& path, bool alone, std::unique_ptr<FileLock>* lock);

  PosixFileLock(Roots& roots, std::string path, Descriptor fd)
      : roots_(roots), path_(std::move(path)), fd_(std::move(fd)) {}

  Status Release() override { return fd_.Close(path_); }
  Status Write(std::string_view data) override;
  Status Read(uint64_t cap, std::string* data) override;
  Status HeldPathIsMine(bool* mine) override;

 private:
  Roots& roots_;
  const std::string path_;
  Descriptor fd_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_POSIX_LOCK_H_
