// SPDX-License-Identifier: Apache-2.0
#include "fault_env.h"

#include <cerrno>
#include <chrono>

#include "memory_env.h"
#include "scratch.h"

namespace layerwise {

namespace {

FaultPlan::Rule Rule(std::optional<std::string> operation, int error_number, int times = 1) {
  FaultPlan::Rule rule;
  rule.operation = std::move(operation);
  rule.error_number = error_number;
  rule.times = times;
  return rule;
}

}  // namespace

TEST_CASE("operations are numbered, and fail by their number") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  REQUIRE_OK(env.WriteFile("/a", "x", 0600));
  CHECK(env.trace() == std::vector<std::string>{"create /a", "write /a", "sync /a"});
  CHECK(env.operations() == 3);
  FaultPlan::Rule rule = Rule(std::nullopt, ENOSPC);
  rule.index = 5;
  REQUIRE_OK(env.Fail(rule));
  const Status status = env.WriteFile("/b", "x", 0600);
  CHECK_ERRNO(status, ENOSPC);
  CHECK(status.path() == "/b");
  CHECK(env.trace().back() == "sync /b");
  CHECK(env.injected() == 1);
  CHECK(memory.LogEntry(memory.LogSize() - 1) == "write /b offset=0 bytes=1");
}

TEST_CASE("operations fail by kind and path, as often as was said") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  FaultPlan::Rule rule = Rule("rename", EIO, 2);
  rule.path_pattern = "*/x";
  REQUIRE_OK(env.Fail(rule));
  REQUIRE_OK(env.WriteFile("/a", "", 0600));
  REQUIRE_OK(env.Rename("/a", "/b"));
  CHECK_ERRNO(env.Rename("/b", "/x"), EIO);
  CHECK_ERRNO(env.Rename("/x", "/b"), EIO);
  REQUIRE_OK(env.Rename("/b", "/x"));
  REQUIRE_OK(env.Fail(Rule("sync_dir", EIO, -1)));
  for (int i = 0; i < 5; ++i) CHECK_ERRNO(env.SyncDir("/"), EIO);
  env.Clear();
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(env.injected() == 7);
  CHECK(!env.Fail(Rule("flush", EIO)).ok());
}

TEST_CASE("every kind of operation can fail") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  REQUIRE_OK(env.WriteFile("/f", "x", 0600));
  REQUIRE_OK(env.MakeDir("/d", 0700));
  std::unique_ptr<WritableFile> out, more;
  std::unique_ptr<ReadableFile> in, again;
  std::unique_ptr<FileLock> lock, second;
  REQUIRE_OK(env.NewWritableFile("/g", 0600, false, &out));
  REQUIRE_OK(env.NewReadableFile("/f", false, &in));
  REQUIRE_OK(env.Lock("/l", 0600, &lock));
  REQUIRE_OK(env.Fail(Rule(std::nullopt, EIO, -1)));
  std::vector<std::string> names;
  std::string data;
  FileInfo info;
  char byte = 0;
  size_t got = 0;
  CHECK_ERRNO(env.MakeDir("/e", 0700), EIO);
  CHECK_ERRNO(env.NewWritableFile("/h", 0600, false, &more), EIO);
  CHECK_ERRNO(env.NewReadableFile("/f", false, &again), EIO);
  CHECK_ERRNO(env.Rename("/f", "/e"), EIO);
  CHECK_ERRNO(env.ReuseFile("/f", "/e", 0600, false, &more), EIO);
  CHECK(env.trace().back() == "reuse /f -> /e");
  CHECK_ERRNO(env.SyncDir("/"), EIO);
  CHECK_ERRNO(env.Unlink("/f"), EIO);
  CHECK_ERRNO(env.RemoveDir("/d"), EIO);
  CHECK_ERRNO(env.ListDir("/", &names), EIO);
  CHECK_ERRNO(env.Stat("/f", &info), EIO);
  CHECK_ERRNO(env.Lock("/m", 0600, &second), EIO);
  CHECK_ERRNO(out->Pwrite("x", 1, 0), EIO);
  CHECK_ERRNO(out->Allocate(10), EIO);
  CHECK_ERRNO(out->Truncate(10), EIO);
  CHECK_ERRNO(out->Sync(), EIO);
  CHECK_ERRNO(in->Pread(&byte, 1, 0, &got), EIO);
  CHECK_ERRNO(lock->Write("x"), EIO);
  CHECK_ERRNO(lock->Read(1, &data), EIO);
  CHECK(env.injected() == 18);
}

TEST_CASE("a short write does half of it and fails") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  FaultPlan::Rule rule = Rule("write", ENOSPC);
  rule.short_write = true;
  REQUIRE_OK(env.Fail(rule));
  CHECK_ERRNO(env.WriteFile("/f", "abcdef", 0600), ENOSPC);
  std::string data;
  REQUIRE_OK(memory.ReadFile("/f", 100, &data));
  CHECK(data == "abc");
}

TEST_CASE("a lock whose sync fails has written") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  std::unique_ptr<FileLock> lock;
  REQUIRE_OK(env.Lock("/l", 0600, &lock));
  REQUIRE_OK(env.Fail(Rule("sync", EIO)));
  CHECK_ERRNO(lock->Write("x"), EIO);
  std::string data;
  REQUIRE_OK(lock->Read(1, &data));
  CHECK(data == "x");
}

TEST_CASE("a delay makes operations slow and lets them succeed") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  REQUIRE_OK(env.Delay("sync", "/f", 0.02));
  const auto begin = std::chrono::steady_clock::now();
  REQUIRE_OK(env.WriteFile("/f", "x", 0600));
  CHECK(std::chrono::steady_clock::now() - begin >= std::chrono::milliseconds(20));
  CHECK(env.injected() == 0);
}

TEST_CASE("a reused file's operations count under its new name") {
  MemoryEnv memory;
  FaultEnv env(&memory);
  REQUIRE_OK(memory.WriteFile("/old", "x", 0600));
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.ReuseFile("/old", "/new", 0600, false, &file));
  REQUIRE_OK(file->Truncate(0));
  CHECK(env.trace() == std::vector<std::string>{"reuse /old -> /new", "truncate /new"});
}

}  // namespace layerwise
