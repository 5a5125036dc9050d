// SPDX-License-Identifier: Apache-2.0
#include "layerwise/mock_env.h"

#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "layerwise/aligned_buffer.h"
#include "scratch.h"

namespace layerwise {

TEST_CASE("a mock keeps records and the size of shards, and counts what is written") {
  MockEnv env;
  REQUIRE(env.MakeDir("/ckpt", 0700).ok());
  REQUIRE(env.WriteFile("/ckpt/record", "text", 0600).ok());
  std::string data;
  CHECK(env.ReadFile("/ckpt/record", 100, &data).ok());
  CHECK(data == "text");

  std::unique_ptr<WritableFile> shard;
  REQUIRE(env.NewWritableFile("/ckpt/shard", 0600, true, &shard).ok());
  CHECK(shard->direct());
  CHECK(shard->alignment().offset == 512);
  AlignedBuffer block;
  REQUIRE(block.Reserve(4096).ok());
  CHECK(shard->Allocate(16384).ok());
  CHECK(shard->Pwrite(block.data(), 4096, 4096).ok());
  CHECK(shard->Pwrite(block.data(), 4095, 8192).error_number() == EINVAL);
  CHECK(shard->Sync().ok());
  FileInfo info;
  CHECK(env.Stat("/ckpt/shard", &info).ok());
  CHECK(info.size == 16384);
  CHECK(shard->Truncate(8192).ok());
  CHECK(env.Stat("/ckpt/shard", &info).ok());
  CHECK(info.size == 8192);
  CHECK(env.counts().bytes == 4096);
  CHECK(env.counts().files == 2);

  std::unique_ptr<ReadableFile> reader;
  CHECK(env.NewReadableFile("/ckpt/shard", true, &reader).error_number() == ENODATA);
}

TEST_CASE("names in a mock behave as on a disk") {
  MockEnv env;
  CHECK(env.MakeDir("/a/b", 0700).error_number() == ENOENT);
  REQUIRE(env.MakeDir("/a", 0700).ok());
  CHECK(env.MakeDir("/a/", 0700).error_number() == EEXIST);
  REQUIRE(env.MakeDir("/a/b", 0700).ok());
  REQUIRE(env.WriteFile("/a/one", "1", 0600).ok());
  CHECK(env.WriteFile("/a/one", "1", 0600).error_number() == EEXIST);
  CHECK(env.WriteFile("/a/one/two", "1", 0600).error_number() == ENOTDIR);
  REQUIRE(env.WriteFile("/a/two", "2", 0600).ok());
  CHECK(env.Rename("/a/one", "/a/two").ok());
  std::vector<std::string> names;
  CHECK(env.ListDir("/a", &names).ok());
  CHECK(names == std::vector<std::string>{"b", "two"});
  CHECK(env.ListDir("/", &names).ok());
  CHECK(names == std::vector<std::string>{"a"});
  CHECK(env.RemoveDir("/a").error_number() == ENOTEMPTY);
  CHECK(env.Unlink("/a/b").error_number() == EISDIR);
  CHECK(env.Unlink("/a/two").ok());
  CHECK(env.Unlink("/a/two").error_number() == ENOENT);
  CHECK(env.RemoveDir("/a/b").ok());
  CHECK(env.RemoveDir("/a").ok());
  CHECK(env.SyncDir("/a").error_number() == ENOENT);

  std::unique_ptr<WritableFile> file;
  REQUIRE(env.NewWritableFile("/retired", 0600, true, &file).ok());
  REQUIRE(file->Close().ok());
  CHECK(env.ReuseFile("/retired", "/next", 0600, true, &file).ok());
  FileInfo info;
  CHECK(env.Stat("/retired", &info).error_number() == ENOENT);
  CHECK(env.Stat("/next", &info).ok());
}

TEST_CASE("a lock of a mock keeps another one out until it is released") {
  MockEnv env;
  std::unique_ptr<FileLock> lock, other;
  REQUIRE(env.Lock("/owner", 0600, &lock).ok());
  CHECK(env.Lock("/owner", 0600, &other).error_number() == EAGAIN);
  CHECK(lock->Write("me").ok());
  std::string data;
  CHECK(lock->Read(10, &data).ok());
  CHECK(data == "me");
  CHECK(lock->Read(1, &data).error_number() == EFBIG);
  bool mine = false;
  CHECK(lock->HeldPathIsMine(&mine).ok());
  CHECK(mine);
  CHECK(lock->Release().ok());
  CHECK(lock->Write("me").error_number() == EBADF);
  CHECK(env.Lock("/owner", 0600, &other).ok());
}

}  // namespace layerwise
