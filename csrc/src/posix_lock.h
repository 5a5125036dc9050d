#ifndef LAYERWISE_SRC_POSIX_LOCK_H_
#define LAYERWISE_SRC_POSIX_LOCK_H_

#include <memory>
#include <string>
#include <utility>

#include "layerwise/env.h"
#include "posix_file.h"

namespace layerwise {

// An open-file-description lock. It lives as long as any copy of its descriptor, and
// forked children close theirs at once.
class PosixFileLock final : public FileLock {
 public:
  static Status Acquire(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock);

  PosixFileLock(std::string path, Descriptor fd) : path_(std::move(path)), fd_(std::move(fd)) {}

  Status Release() override { return fd_.Close(path_); }
  Status Write(std::string_view data) override;
  Status Read(uint64_t cap, std::string* data) override;
  Status HeldPathIsMine(bool* mine) override;

 private:
  const std::string path_;
  Descriptor fd_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_POSIX_LOCK_H_
