// SPDX-License-Identifier: Apache-2.0
#include "fault_env.h"

#include <utility>

namespace layerwise {

namespace {

// Has no descriptor, so that every write comes by here.
class FaultWritableFile final : public WritableFile {
 public:
  FaultWritableFile(std::shared_ptr<FaultPlan> plan, std::string path, std::unique_ptr<WritableFile> base)
      : plan_(std::move(plan)), path_(std::move(path)), base_(std::move(base)) {}

  bool direct() const override { return base_->direct(); }
  DirectIoAlignment alignment() const override { return base_->alignment(); }

  Status Pwrite(const void* data, size_t n, uint64_t offset) override {
    const FaultPlan::Verdict verdict = plan_->Decide("write", path_);
    if (verdict.status.ok()) return base_->Pwrite(data, n, offset);
    if (verdict.short_write) {
      const size_t unit = base_->alignment().offset;
      Status status = base_->Pwrite(data, n / 2 / unit * unit, offset);
      if (!status.ok()) return status;
    }
    return verdict.status;
  }

  Status Allocate(uint64_t size) override {
    const Status status = plan_->Decide("allocate", path_).status;
    return status.ok() ? base_->Allocate(size) : status;
  }

  Status Truncate(uint64_t size) override {
    const Status status = plan_->Decide("truncate", path_).status;
    return status.ok() ? base_->Truncate(size) : status;
  }

  Status Sync() override {
    const Status status = plan_->Decide("sync", path_).status;
    return status.ok() ? base_->Sync() : status;
  }

  Status Close() override { return base_->Close(); }

 private:
  const std::shared_ptr<FaultPlan> plan_;
  const std::string path_;
  const std::unique_ptr<WritableFile> base_;
};

class FaultReadableFile final : public ReadableFile {
 public:
  FaultReadableFile(std::shared_ptr<FaultPlan> plan, std::string path, std::unique_ptr<ReadableFile> base)
      : plan_(std::move(plan)), path_(std::move(path)), base_(std::move(base)) {}

  uint64_t size() const override { return base_->size(); }
  bool direct() const override { return base_->direct(); }
  DirectIoAlignment alignment() const override { return base_->alignment(); }

  Status Pread(void* data, size_t n, uint64_t offset, size_t* got) override {
    *got = 0;
    const Status status = plan_->Decide("read", path_).status;
    return status.ok() ? base_->Pread(data, n, offset, got) : status;
  }

  double Cached() override { return base_->Cached(); }

  Status Close() override { return base_->Close(); }

 private:
  const std::shared_ptr<FaultPlan> plan_;
  const std::string path_;
  const std::unique_ptr<ReadableFile> base_;
};

class FaultFileLock final : public FileLock {
 public:
  FaultFileLock(std::shared_ptr<FaultPlan> plan, std::string path, std::unique_ptr<FileLock> base)
      : plan_(std::move(plan)), path_(std::move(path)), base_(std::move(base)) {}

  Status Release() override { return base_->Release(); }

  Status Write(std::string_view data) override {
    Status status = plan_->Decide("write", path_).status;
    if (!status.ok()) return status;
    status = base_->Write(data);
    const Status flushed = plan_->Decide("sync", path_).status;
    return status.ok() ? flushed : status;
  }

  Status Read(uint64_t cap, std::string* data) override {
    const Status status = plan_->Decide("read", path_).status;
    return status.ok() ? base_->Read(cap, data) : status;
  }

  Status HeldPathIsMine(bool* mine) override { return base_->HeldPathIsMine(mine); }

 private:
  const std::shared_ptr<FaultPlan> plan_;
  const std::string path_;
  const std::unique_ptr<FileLock> base_;
};

}  // namespace

Status FaultEnv::Delay(const std::string& operation, const std::string& path_pattern, double seconds) {
  if (!(seconds > 0)) return Status::InvalidArgument("a delay of " + std::to_string(seconds) + " s");
  FaultPlan::Rule rule;
  rule.operation = operation;
  rule.path_pattern = path_pattern;
  rule.times = -1;
  rule.delay_s = seconds;
  return plan_->Add(std::move(rule));
}

Status FaultEnv::MakeDir(const std::string& path, uint32_t mode) {
  const Status status = plan_->Decide("make_dir", path).status;
  return status.ok() ? target()->MakeDir(path, mode) : status;
}

Status FaultEnv::NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                                 std::unique_ptr<WritableFile>* file) {
  Status status = plan_->Decide("create", path).status;
  std::unique_ptr<WritableFile> base;
  if (status.ok()) status = target()->NewWritableFile(path, mode, direct, &base);
  if (status.ok()) *file = std::make_unique<FaultWritableFile>(plan_, path, std::move(base));
  return status;
}

Status FaultEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                           std::unique_ptr<WritableFile>* file) {
  Status status = plan_->Decide("reuse", from, to).status;
  std::unique_ptr<WritableFile> base;
  if (status.ok()) status = target()->ReuseFile(from, to, mode, direct, &base);
  if (status.ok()) *file = std::make_unique<FaultWritableFile>(plan_, to, std::move(base));
  return status;
}

Status FaultEnv::NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) {
  Status status = plan_->Decide("open", path).status;
  std::unique_ptr<ReadableFile> base;
  if (status.ok()) status = target()->NewReadableFile(path, direct, &base);
  if (status.ok()) *file = std::make_unique<FaultReadableFile>(plan_, path, std::move(base));
  return status;
}

Status FaultEnv::Rename(const std::string& from, const std::string& to) {
  const Status status = plan_->Decide("rename", from, to).status;
  return status.ok() ? target()->Rename(from, to) : status;
}

Status FaultEnv::SyncDir(const std::string& path) {
  const Status status = plan_->Decide("sync_dir", path).status;
  return status.ok() ? target()->SyncDir(path) : status;
}

Status FaultEnv::Unlink(const std::string& path) {
  const Status status = plan_->Decide("unlink", path).status;
  return status.ok() ? target()->Unlink(path) : status;
}

Status FaultEnv::RemoveDir(const std::string& path) {
  const Status status = plan_->Decide("remove_dir", path).status;
  return status.ok() ? target()->RemoveDir(path) : status;
}

Status FaultEnv::ListDir(const std::string& path, std::vector<std::string>* names) {
  const Status status = plan_->Decide("list_dir", path).status;
  return status.ok() ? target()->ListDir(path, names) : status;
}

Status FaultEnv::Stat(const std::string& path, FileInfo* info) {
  const Status status = plan_->Decide("stat", path).status;
  return status.ok() ? target()->Stat(path, info) : status;
}

Status FaultEnv::Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) {
  Status status = plan_->Decide("lock", path).status;
  std::unique_ptr<FileLock> base;
  if (status.ok()) status = target()->Lock(path, mode, &base);
  if (status.ok()) *lock = std::make_unique<FaultFileLock>(plan_, path, std::move(base));
  return status;
}

}  // namespace layerwise
