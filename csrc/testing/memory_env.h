// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTING_MEMORY_ENV_H_
#define LAYERWISE_TESTING_MEMORY_ENV_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "after_crash.h"
#include "layerwise/env.h"

namespace layerwise {

class LoggedDisk;

// A file system in memory that forgets what was not flushed, for tests: every
// operation that changes it is kept in a log, and Crash gives what a disk may hold
// if power failed after any prefix of that log (see after_crash.h).
//
// It begins with an empty root directory. Paths and direct files are as
// memory_disk_env.h says; everything is kept.
//
// A file's operations are logged, and matched by Drop, under the path at which it
// was opened; ReuseFile is logged, and matched, as the rename that it begins with.
// Threads: every method may be called by several threads at once.
class MemoryEnv final : public EnvWrapper {
 public:
  MemoryEnv();
  ~MemoryEnv() override;

  // The number of operations in the log, and operation i as text, such as
  // "rename /a -> /b". REQUIRES: i < LogSize().
  size_t LogSize() const;
  std::string LogEntry(size_t i) const;

  // Puts a text into the log, to be found again by its index.
  void Mark(const std::string& text);
  std::vector<std::pair<size_t, std::string>> Marks() const;

  // A new file system: this one after a power failure that hit when `prefix`
  // operations had been done. All that it holds is durable, its log is empty, its
  // locks are free. This one is not changed. REQUIRES: prefix <= LogSize().
  std::unique_ptr<MemoryEnv> Crash(size_t prefix, uint64_t seed, CrashPolicy policy) const;

  // A hash of every path, kind and byte that it holds: the same for two that hold the
  // same, however they came to it.
  uint64_t Fingerprint() const;

  // From now on, operations of this kind ("sync", "sync_dir", "rename", "write" or
  // "truncate") on a path that matches (fnmatch; "*" matches "/" too; for a rename the old or
  // the new path) are acknowledged, but do nothing.
  Status Drop(const std::string& operation, const std::string& path_pattern);
  uint64_t dropped() const;

 private:
  explicit MemoryEnv(std::shared_ptr<LoggedDisk> disk);
  MemoryEnv(std::shared_ptr<LoggedDisk> disk, std::unique_ptr<Env> env);

  const std::shared_ptr<LoggedDisk> disk_;
  const std::unique_ptr<Env> env_;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_MEMORY_ENV_H_
