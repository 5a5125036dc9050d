// SPDX-License-Identifier: Apache-2.0
// ShardWriter's file: made at once, or by an errand of the pool.

#include <cerrno>
#include <utility>

#include "guarded.h"
#include "layerwise/calls.h"
#include "layerwise/shard_writer.h"

namespace layerwise {

namespace {

Status CheckRoom(const WriterPool& pool, const Plan& plan, const std::string& path) {
  if (plan.blocks().empty() || plan.block_bytes() <= pool.block_bytes()) return Status::Ok();
  return Status::InvalidArgument("a block of " + std::to_string(plan.block_bytes()) + " bytes in the plan of " + path +
                                 "; the pool's bounce buffers have " + std::to_string(pool.block_bytes()));
}

// The path may be missing, and the error that led here is the one to tell.
void Remove(Env* env, const std::string& path) {
  const OngoingCall call("unlink", path);
  static_cast<void>(Guarded([&] { return env->Unlink(path); }));
}

Status MakeFolder(Env* env, const std::string& folder, uint32_t mode) {
  const OngoingCall call("make directory", folder);
  const Status status = env->MakeDir(folder, mode);
  return status.error_number() == EEXIST ? Status::Ok() : status;  // another rank was first
}

// A file without room for the plan does not stay: what was reserved of it goes back to
// the disk, which is full.
Status Reserve(Env* env, const Plan& plan, const std::string& path, std::unique_ptr<WritableFile>* file) {
  if (plan.end() == 0) return Status::Ok();
  Status status;
  {
    const OngoingCall call("allocate", path);
    status = (*file)->Allocate(plan.end());
  }
  if (!status.ok()) {
    file->reset();
    Remove(env, path);
  }
  return status;
}

Status NewFile(Env* env, const Plan& plan, const std::string& path, uint32_t mode, bool direct,
               std::unique_ptr<WritableFile>* file) {
  Status status;
  {
    const OngoingCall call("create", path);
    status = env->NewWritableFile(path, mode, direct, file);
  }
  return status.ok() ? Reserve(env, plan, path, file) : status;
}

Status OldFile(Env* env, const Plan& plan, const ShardWriter::Target& target, std::unique_ptr<WritableFile>* file) {
  Status status;
  {
    const OngoingCall call("reuse", target.spare);
    status = env->ReuseFile(target.spare, target.path, target.mode, target.direct, file);
  }
  return status.ok() ? Reserve(env, plan, target.path, file) : status;
}

}  // namespace

Status ShardWriter::Create(Env* env, WriterPool* pool, std::shared_ptr<const Plan> plan,
                           const std::string& path, uint32_t mode, bool direct,
                           std::unique_ptr<ShardWriter>* writer) {
  Status status = CheckRoom(*pool, *plan, path);
  if (!status.ok()) return status;
  std::unique_ptr<WritableFile> file;
  status = NewFile(env, *plan, path, mode, direct, &file);
  if (!status.ok()) return status;
  writer->reset(new ShardWriter(pool, std::move(plan), path));
  (*writer)->Take(std::move(file));
  return Status::Ok();
}

Status ShardWriter::Order(Env* env, WriterPool* pool, std::shared_ptr<const Plan> plan, Target target,
                          std::unique_ptr<ShardWriter>* writer) {
  Status status = CheckRoom(*pool, *plan, target.path);
  if (!status.ok()) return status;
  std::unique_ptr<ShardWriter> made(new ShardWriter(pool, std::move(plan), target.path));
  try {
    pool->Hold(made.get());
    pool->Hold(&made->evacuated_sink_);
    made->making_ = true;
    pool->Run([self = made.get(), env, target = std::move(target)](const Status& refused) {
      self->Fill(env, target, refused);
    });
  } catch (...) {
    made->making_ = false;
    pool->Release(made.get());
    pool->Release(&made->evacuated_sink_);
    throw;
  }
  *writer = std::move(made);
  return Status::Ok();
}

void ShardWriter::Take(std::unique_ptr<WritableFile> file) {
  direct_ = file->direct();
  alignment_ = file->alignment();
  file_ = std::move(file);
}

// The errand of Order. It ends with the writer filled, or poisoned and nothing on disk.
void ShardWriter::Fill(Env* env, const Target& target, Status refused) {
  if (refused.ok()) {
    refused = Guarded([&] { return Make(env, target); });
    if (refused.error_number() == ENOMEM) {
      // It may have ended anywhere.
      Remove(env, target.path);
      if (!target.spare.empty()) Remove(env, target.spare);
    }
  }
  {
    std::lock_guard lock(mutex_);
    if (error_.ok()) error_ = std::move(refused);
  }
  // Blocks fail one by one if there is an error.
  pool_->Release(this);
  pool_->Release(&evacuated_sink_);
  std::lock_guard lock(mutex_);
  making_ = false;
  changed_->notify_all();
}

Status ShardWriter::Make(Env* env, const Target& target) {
  if (target.before != nullptr) {
    {
      std::unique_lock lock(target.before->mutex_);
      target.before->changed_->wait(lock, [&] { return !target.before->making_; });
    }
    Remove(env, target.path);
  }
  Status status = error();
  if (status.ok()) status = MakeFolder(env, target.folder, target.folder_mode);
  if (!status.ok()) {
    if (!target.spare.empty()) Remove(env, target.spare);  // it was given away for this
    return status;
  }
  std::unique_ptr<WritableFile> file;
  if (!target.spare.empty()) {
    status = OldFile(env, *plan_, target, &file);
    reused_ = status.ok();
    if (!reused_) {
      Remove(env, target.spare);
      Remove(env, target.path);
      std::lock_guard lock(mutex_);
      reuse_refused_ = status;
    }
  }
  if (file == nullptr) status = NewFile(env, *plan_, target.path, target.mode, target.direct, &file);
  if (status.ok() && !(status = error()).ok()) {
    file.reset();  // aborted meanwhile: whoever did so may have removed all that was there
    Remove(env, target.path);
  }
  if (status.ok()) Take(std::move(file));
  return status;
}

}  // namespace layerwise
