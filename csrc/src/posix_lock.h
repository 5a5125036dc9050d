#ifndef LAYERWISE_SRC_POSIX_LOCK_H_
#define LAYERWISE_SRC_POSIX_LOCK_H_

#include <memory>
#include <string>

#include "layerwise/env.h"
#include "posix_file.h"

namespace layerwise {

// An open-file-description lock. Children made by fork close their copy of the
// descriptor at once: else the lock would live as long as the last of them.
class PosixFileLock final : public FileLock {
 public:
  static Status Acquire(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock);

  PosixFileLock(std::string path, Descriptor fd);
  ~PosixFileLock() override;

  Status Release() override;
  Status Write(std::string_view data) override;
  Status Read(uint64_t cap, std::string* data) override;
  Status HeldPathIsMine(bool* mine) override;

 private:
  static void CloseInChild();

  const std::string path_;
  Descriptor fd_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_POSIX_LOCK_H_
