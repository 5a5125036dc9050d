// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_POSIX_ENV_H_
#define LAYERWISE_POSIX_ENV_H_

#include <memory>

#include "layerwise/env.h"

namespace layerwise {

class Roots;

// The Env of the running system (Linux). Locks are open-file-description locks,
// so they also exclude each other within one process.
//
// A file whose file system demands more than 4096 bytes of alignment is opened
// without direct I/O, so that 4096 is enough for every direct file.
class PosixEnv : public Env {
 public:
  PosixEnv();
  ~PosixEnv() override;

  void Confine(const std::string& root) override;
  void LetGo() override;
  Status MakeDir(const std::string& path, uint32_t mode) override;
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override;
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override;
  Status NewReadableFile(const std::string& path, bool direct,
                         std::unique_ptr<ReadableFile>* file) override;
  Status Rename(const std::string& from, const std::string& to) override;
  Status SyncDir(const std::string& path) override;
  Status Unlink(const std::string& path) override;
  Status RemoveDir(const std::string& path) override;
  Status ListDir(const std::string& path, std::vector<std::string>* names) override;
  Status Stat(const std::string& path, FileInfo* info) override;
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) override;
  Status Hold(const std::string& path, bool alone, std::unique_ptr<FileLock>* lock) override;
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override;
  Status FileSystem(const std::string& path, uint64_t* type) override;

 protected:
  Roots& roots() { return *roots_; }

 private:
  const std::unique_ptr<Roots> roots_;
};

}  // namespace layerwise

#endif  // LAYERWISE_POSIX_ENV_H_
