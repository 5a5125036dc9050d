// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <thread>

#include "layerwise/shard_writer.h"
#include "shard_fixture.h"

// The file of a shard: new or over a retired one, made by a thread while blocks wait.

namespace layerwise {

SHARD_TEST_CASE("a file that is made without memory fails, and leaves none") {
  for (const char* operation : {"make_dir", "reuse", "create", "allocate", "unlink"}) {
    ShardFixture f;
    REQUIRE_OK(f.disk.WriteFile("/old", Pattern(4096), 0600));
    if (operation == std::string("create") || operation == std::string("unlink")) f.Fail("reuse", EIO);
    f.NoMemory(operation);
    Tensor tensor(Pattern(4096));
    auto writer = f.Over(f.Simple(1));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    REQUIRE_OK(writer->Submit(0, 1));
    REQUIRE(writer->Wait(10));
    FileInfo info;
    if (operation == std::string("unlink")) {
      REQUIRE_OK(writer->error());  // what can't be removed hinders nothing
      continue;
    }
    CHECK_ERRNO(writer->error(), ENOMEM);
    CHECK(writer->counts().leased == 0);
    CHECK_ERRNO(f.disk.Stat("/s", &info), ENOENT);
    CHECK_ERRNO(f.disk.Stat("/old", &info), ENOENT);
  }
}

SHARD_TEST_CASE("creation fails where the space cannot be reserved, and leaves no file") {
  ShardFixture f;
  f.Fail("allocate", ENOSPC);
  std::unique_ptr<ShardWriter> writer;
  FileInfo info;
  CHECK_ERRNO(ShardWriter::Create(&f.env, f.pool.get(), f.Simple(1), "/s", 0600, true, &writer), ENOSPC);
  CHECK_ERRNO(f.disk.Stat("/s", &info), ENOENT);
  REQUIRE_OK(f.disk.WriteFile("/old", std::string(4096, ' '), 0600));
  CHECK(writer == nullptr);
  f.Fail("allocate", ENOSPC, 2);
  Tensor tensor(Pattern(4096));
  auto ordered = f.Over(f.Simple(1));
  REQUIRE_OK(ordered->SetAddress(0, tensor.address()));
  REQUIRE_OK(ordered->Submit(0, 1));
  REQUIRE(ordered->Wait(10));
  CHECK_ERRNO(ordered->error(), ENOSPC);
  CHECK_ERRNO(ordered->reuse_refused(), ENOSPC);
  CHECK(ordered->counts().leased == 0);
  REQUIRE_OK(f.disk.WriteFile("/old", std::string(4096, ' '), 0600));
  f.Fail("make_dir", ENOSPC);
  auto without_folder = f.Over(f.Simple(1));
  REQUIRE(without_folder->Wait(10));
  CHECK_ERRNO(without_folder->error(), ENOSPC);
  CHECK_ERRNO(f.disk.Stat("/old", &info), ENOENT);
  CHECK_ERRNO(f.disk.Stat("/s", &info), ENOENT);
}

SHARD_TEST_CASE("a retired file is written over, and what is past the new end is cut off") {
  for (size_t old_size : {size_t{4096}, size_t{64 * 4096}}) {
    ShardFixture f;
    Tensor tensor(Pattern(3 * 4096));
    REQUIRE_OK(f.disk.WriteFile("/old", std::string(4096, '\0') + std::string(old_size - 4096, 'o'), 0600));
    auto writer = f.Over(f.Simple(3));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    REQUIRE_OK(writer->Submit(0, 3));
    REQUIRE(writer->Wait(10));
    REQUIRE_OK(writer->Finish(Header()));
    REQUIRE_OK(f.env.SyncDir("/"));
    CHECK((f.Content() == Header() + tensor.content()));
    FileInfo info;
    CHECK_ERRNO(f.disk.Stat("/old", &info), ENOENT);
    if (&f.disk != &f.memory) continue;  // only memory can lose power here
    for (uint64_t seed = 0; seed < 20; ++seed) {
      auto after = f.memory.Crash(f.memory.LogSize(), seed, CrashPolicy::kRandom);
      std::string data;
      REQUIRE_OK(after->ReadFile("/s", 1 << 20, &data));
      CHECK(data == Header() + tensor.content());
      CHECK_ERRNO(after->Stat("/old", &info), ENOENT);
    }
  }
}

SHARD_TEST_CASE("a file that a reader has open is not written over, and a new one is made") {
  ShardFixture f;
  Tensor tensor(Pattern(4096));
  REQUIRE_OK(f.disk.WriteFile("/old", Pattern(8192), 0600));
  std::unique_ptr<ReadableFile> reader;
  REQUIRE_OK(f.disk.NewReadableFile("/old", false, &reader));
  auto writer = f.Over(f.Simple(1));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
  REQUIRE(writer->Wait(10));
  CHECK_ERRNO(writer->reuse_refused(), EBUSY);
  REQUIRE_OK(writer->Finish(Header()));
  CHECK((f.Content() == Header() + tensor.content()));
  AlignedBuffer seen;
  size_t got = 0;
  REQUIRE_OK(seen.Reserve(8192));
  REQUIRE_OK(reader->Pread(seen.data(), 8192, 0, &got));
  CHECK((std::string(seen.data(), got) == Pattern(8192)));
}

SHARD_TEST_CASE("what is submitted before the file is made waits for it, and can be evacuated") {
  ShardFixture f(2, 6);
  REQUIRE_OK(f.disk.WriteFile("/old", Pattern(4096), 0600));
  REQUIRE_OK(f.env.Delay("reuse", "/old", 600));
  Tensor tensor(Pattern(4 * 4096));
  const std::string saved = tensor.content();
  auto writer = f.Over(f.Simple(4));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 4));
  CHECK(!writer->Wait(0.01));
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  bool safe = false;
  REQUIRE_OK(writer->Evacuate(0, 4, 10, &safe));
  CHECK(safe);
  f.env.Clear();
  tensor.Set(Pattern(4 * 4096, 9));
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(writer->Finish(Header()));
  CHECK((f.Content() == Header() + saved));
}

SHARD_TEST_CASE("an abort while the file is made leaves none, and one before does not make it") {
  for (bool under_way : {true, false}) {
    ShardFixture f;
    Tensor tensor(Pattern(4096));
    REQUIRE_OK(f.disk.WriteFile("/old", Pattern(4096), 0600));
    REQUIRE_OK(f.env.Delay("make_dir", "/", 600));
    auto first = f.Over(f.Simple(1));
    while (f.env.trace().empty()) std::this_thread::yield();
    std::unique_ptr<ShardWriter> second;
    ShardWriter::Target target;
    target.folder = "/";
    target.path = "/t";
    REQUIRE_OK(ShardWriter::Order(&f.env, f.pool.get(), f.Simple(1), target, &second));
    ShardWriter& writer = under_way ? *first : *second;
    REQUIRE_OK(writer.SetAddress(0, tensor.address()));
    REQUIRE_OK(writer.Submit(0, 1));
    CHECK(!writer.Abort(0.01));
    f.env.Clear();
    CHECK(writer.Abort());
    CHECK(first->Wait(10));
    CHECK(second->Wait(10));
    CHECK_ERRNO(writer.error(), ECANCELED);
    FileInfo info;
    CHECK((f.disk.Stat("/s", &info).ok()) == !under_way);
    CHECK((f.disk.Stat("/t", &info).ok()) == under_way);
    CHECK_ERRNO(f.disk.Stat("/old", &info), ENOENT);
  }
}

SHARD_TEST_CASE("a file that is begun again is made once the one before is out of the way") {
  ShardFixture f;
  Tensor tensor(Pattern(2 * 4096));
  REQUIRE_OK(f.env.Delay("create", "/s", 0.05));
  REQUIRE_OK(f.disk.WriteFile("/old", Pattern(4096), 0600));
  std::shared_ptr<ShardWriter> before = f.Over(f.Simple(1));
  REQUIRE_OK(before->SetAddress(0, tensor.address()));
  REQUIRE_OK(before->Submit(0, 1));
  std::unique_ptr<ShardWriter> writer;
  ShardWriter::Target target;
  target.folder = "/";
  target.path = "/s";
  target.before = before;
  REQUIRE_OK(ShardWriter::Order(&f.env, f.pool.get(), f.Simple(2), target, &writer));
  CHECK(before->Abort());
  before.reset();
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 2));
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(writer->Finish(Header()));
  CHECK((f.Content() == Header() + tensor.content()));
}

}  // namespace layerwise
