// SPDX-License-Identifier: Apache-2.0
#include "memory_disk.h"

#include <cerrno>
#include <memory>
#include <string>

#include "memory_disk_env.h"
#include "scratch.h"

namespace layerwise {

namespace {

struct SizeOnlyDisk {
  std::shared_ptr<MemoryDisk> disk = std::make_shared<MemoryDisk>(MemoryDisk::DirectFiles::kSizeOnly);
  MemoryDiskEnv env{disk};

  size_t nodes() {
    std::lock_guard lock(disk->mutex());
    return disk->nodes();
  }
};

}  // namespace

TEST_CASE("what has no name and nobody has open takes no memory") {
  SizeOnlyDisk disk;
  MemoryDiskEnv& env = disk.env;
  REQUIRE_OK(env.MakeDir("/d", 0700));
  REQUIRE_OK(env.WriteFile("/d/a", "a", 0600));
  REQUIRE_OK(env.WriteFile("/d/b", "b", 0600));
  CHECK(disk.nodes() == 4);
  REQUIRE_OK(env.Rename("/d/a", "/d/b"));
  CHECK(disk.nodes() == 3);

  std::unique_ptr<ReadableFile> reader;
  std::unique_ptr<FileLock> lock;
  REQUIRE_OK(env.NewReadableFile("/d/b", false, &reader));
  REQUIRE_OK(env.Lock("/d/b", 0600, &lock));
  REQUIRE_OK(env.Unlink("/d/b"));
  CHECK(disk.nodes() == 3);
  REQUIRE_OK(lock->Release());
  char byte = 0;
  size_t got = 0;
  REQUIRE_OK(reader->Pread(&byte, 1, 0, &got));
  CHECK(byte == 'a');
  reader.reset();
  CHECK(disk.nodes() == 2);
  REQUIRE_OK(env.RemoveDir("/d"));
  CHECK(disk.nodes() == 1);
}

TEST_CASE("a file that keeps only its size still does when it is reused") {
  SizeOnlyDisk disk;
  const std::string sector(512, 'x');
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(disk.env.WriteFile("/record", "plain", 0600));
  REQUIRE_OK(disk.env.ReuseFile("/record", "/shard", 0600, true, &file));
  std::unique_ptr<ReadableFile> reader;
  FileInfo info;
  REQUIRE_OK(disk.env.Stat("/shard", &info));
  CHECK(info.size == 5);
  CHECK_ERRNO(disk.env.NewReadableFile("/shard", false, &reader), ENODATA);
  REQUIRE_OK(file->Truncate(512));
  REQUIRE_OK(file->Close());
  REQUIRE_OK(disk.env.ReuseFile("/shard", "/next", 0600, false, &file));
  REQUIRE_OK(file->Pwrite(sector.data(), sector.size(), 256));
  REQUIRE_OK(disk.env.Stat("/next", &info));
  CHECK(info.size == 768);
  CHECK_ERRNO(disk.env.NewReadableFile("/next", false, &reader), ENODATA);
}

TEST_CASE("what outlives the Env of its disk can still be closed") {
  std::unique_ptr<WritableFile> file;
  std::unique_ptr<FileLock> lock;
  {
    SizeOnlyDisk disk;
    REQUIRE_OK(disk.env.NewWritableFile("/f", 0600, false, &file));
    REQUIRE_OK(disk.env.Lock("/l", 0600, &lock));
  }
  REQUIRE_OK(file->Pwrite("x", 1, 0));
  REQUIRE_OK(file->Close());
  REQUIRE_OK(lock->Release());
}

}  // namespace layerwise
