// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTING_FAULT_ENV_H_
#define LAYERWISE_TESTING_FAULT_ENV_H_

#include <memory>
#include <string>
#include <vector>

#include "fault_plan.h"
#include "layerwise/env.h"

namespace layerwise {

// An Env that passes everything on to another one and fails on purpose, for tests.
//
// Every operation is numbered from 0 when it begins: create, reuse, open, write,
// read, sync, allocate, truncate, rename, sync_dir, make_dir, unlink, remove_dir,
// list_dir, stat, lock. FileLock::Write counts as a write and a sync, FileLock::Read as
// a read; a file's operations go under the path at which it was opened (its new one, if
// reused). Whatever is not named here is passed on uncounted.
//
// A failed operation does not reach the other Env, except that a failed FileLock's
// sync does write. Threads: every method may be called by several threads at once.
class FaultEnv final : public EnvWrapper {
 public:
  // REQUIRES: base outlives this Env and its files.
  explicit FaultEnv(Env* base) : EnvWrapper(base), plan_(std::make_shared<FaultPlan>()) {}

  // Fails what the rule matches with rule.error_number. With short_write, the first
  // half of a write (in whole units of the file's alignment) is done before that.
  // Of several rules that match, the first added decides.
  Status Fail(FaultPlan::Rule rule) { return plan_->Add(std::move(rule)); }

  // Delays every operation of this kind whose path matches.
  Status Delay(const std::string& operation, const std::string& path_pattern, double seconds);

  // Forgets what Fail and Delay said, also of what is being delayed; the counts go on.
  void Clear() { plan_->Clear(); }

  uint64_t operations() const { return plan_->operations(); }
  uint64_t injected() const { return plan_->injected(); }
  // Operation i as text, such as "write /dir/file".
  std::vector<std::string> trace() const { return plan_->trace(); }

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

 private:
  const std::shared_ptr<FaultPlan> plan_;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_FAULT_ENV_H_
