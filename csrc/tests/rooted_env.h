// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTS_ROOTED_ENV_H_
#define LAYERWISE_TESTS_ROOTED_ENV_H_

#include <string>
#include <utility>
#include <vector>

#include "layerwise/env.h"

namespace layerwise {

// Another Env with a directory of it as the root: "/s" is "<root>/s".
class RootedEnv final : public EnvWrapper {
 public:
  // REQUIRES: base outlives this Env and its files.
  RootedEnv(Env* base, std::string root) : EnvWrapper(base), root_(std::move(root)) {}

  void Confine(const std::string& root) override { target()->Confine(root_ + root); }
  Status MakeDir(const std::string& path, uint32_t mode) override { return target()->MakeDir(root_ + path, mode); }
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override {
    return target()->NewWritableFile(root_ + path, mode, direct, file);
  }
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override {
    return target()->ReuseFile(root_ + from, root_ + to, mode, direct, file);
  }
  Status NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) override {
    return target()->NewReadableFile(root_ + path, direct, file);
  }
  Status Rename(const std::string& from, const std::string& to) override {
    return target()->Rename(root_ + from, root_ + to);
  }
  Status SyncDir(const std::string& path) override { return target()->SyncDir(root_ + path); }
  Status Unlink(const std::string& path) override { return target()->Unlink(root_ + path); }
  Status RemoveDir(const std::string& path) override { return target()->RemoveDir(root_ + path); }
  Status ListDir(const std::string& path, std::vector<std::string>* names) override {
    return target()->ListDir(root_ + path, names);
  }
  Status Stat(const std::string& path, FileInfo* info) override { return target()->Stat(root_ + path, info); }
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) override {
    return target()->Lock(root_ + path, mode, lock);
  }
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override {
    return target()->DirectIo(root_ + dir, alignment);
  }
  Status FileSystem(const std::string& path, uint64_t* type) override {
    return target()->FileSystem(root_ + path, type);
  }

 private:
  const std::string root_;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_ROOTED_ENV_H_
