// SPDX-License-Identifier: Apache-2.0
#include "layerwise/shard_reader.h"

#include <algorithm>
#include <cerrno>

#include "answers.h"
#include "layerwise/hash.h"
#include "layerwise/posix_env.h"
#include "shard_fixture.h"

namespace layerwise {

namespace {

// What is in time on a quiet machine may not be on one that is emulated, and busy.
template <typename Call>
Status Tried(Call call) {
  Status status = call();
  for (int i = 0; i < 200 && status.error_number() == ETIMEDOUT; ++i) status = call();
  return status;
}

}  // namespace

SHARD_TEST_CASE("a read that does not come back is an error in time, and later touches no destination") {
  ShardFixture f;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 2, .patience_s = 0.05}, &pool));
  const std::string content(8 * 4096, 'x');
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  std::unique_ptr<ShardReader> opened;
  REQUIRE_OK(Tried([&] { return ShardReader::Open(&f.env, pool.get(), "/s", false, &opened); }));
  std::shared_ptr<ShardReader> reader = std::move(opened);
  std::vector<ShardReader::Block> blocks;
  std::vector<ShardReader::Segment> segments;
  std::string memory(content.size(), '-');
  for (uint64_t i = 0; i < 8; ++i) {
    blocks.push_back({4096 * i, 4096, 0, false});
    segments.push_back({i, 0, reinterpret_cast<uintptr_t>(memory.data()) + 4096 * i, 4096});
  }
  std::vector<size_t> bad;
  REQUIRE_OK(Tried([&] { return reader->ReadBlocks(blocks, segments, &bad); }));
  CHECK(memory == content);
  memory.assign(memory.size(), '-');
  REQUIRE_OK(f.env.Delay("read", "/s", 600));
  std::string data;
  CHECK_ERRNO(reader->Read(0, 4096, &data), ETIMEDOUT);
  CHECK_ERRNO(reader->ReadBlocks(blocks, segments, &bad), ETIMEDOUT);
  REQUIRE_OK(f.env.Delay("open", "/s", 600));
  CHECK_ERRNO(ShardReader::Open(&f.env, pool.get(), "/s", false, &opened), ETIMEDOUT);
  reader.reset();
  f.env.Clear();
  CHECK(pool->Close());  // all that was under way has come back
  CHECK(memory == std::string(content.size(), '-'));
}

SHARD_TEST_CASE("a thread that reads and finds no memory fails the read, and goes on") {
  ShardFixture f;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 2, .patience_s = 10}, &pool));
  const std::string content(4096, 'x');
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  std::unique_ptr<ShardReader> reader;
  f.NoMemory("open");
  CHECK_ERRNO(ShardReader::Open(&f.env, pool.get(), "/s", false, &reader), ENOMEM);
  REQUIRE_OK(ShardReader::Open(&f.env, pool.get(), "/s", false, &reader));
  std::string memory(4096, '-');
  const std::vector<ShardReader::Segment> segments{{0, 0, reinterpret_cast<uintptr_t>(memory.data()), 4096}};
  std::vector<size_t> bad;
  f.NoMemory("read");
  CHECK_ERRNO(reader->ReadBlocks({{0, 4096, 0, false}}, segments, &bad), ENOMEM);
  REQUIRE_OK(reader->ReadBlocks({{0, 4096, 0, false}}, segments, &bad));
  CHECK(memory == content);
}

namespace {

std::unique_ptr<ShardReader> Open(Env* env, ShardFixture* f, const std::string& path, bool direct = true) {
  std::unique_ptr<ShardReader> reader;
  REQUIRE_OK(ShardReader::Open(env, f->pool.get(), path, direct, &reader));
  return reader;
}

}  // namespace

TEST_CASE("any range is read, aligned or not, and cut at the end of the file") {
  ShardFixture f;
  ScratchDir dir;
  Env& posix = DiskEnv();
  const std::string content = Pattern(10000);
  REQUIRE_OK(posix.WriteFile(dir / "s", content, 0600));
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  for (bool direct : {true, false}) {
    auto on_disk = Open(&posix, &f, dir / "s", direct);
    auto in_memory = Open(&f.env, &f, "/s", direct);
    for (ShardReader* reader : {on_disk.get(), in_memory.get()}) {
      CHECK(reader->size() == 10000);
      for (size_t offset : {0, 1, 511, 512, 4096, 9999, 10000, 20000}) {
        for (size_t n : {0, 1, 513, 4096, 30000}) {
          std::string data;
          REQUIRE_OK(reader->Read(offset, n, &data));
          CHECK(data == (offset < content.size() ? content.substr(offset, n) : ""));
        }
      }
      std::string data;
      REQUIRE_OK(reader->Read(5, UINT64_MAX, &data));
      CHECK(data == content.substr(5));
    }
  }
}

TEST_CASE("sound blocks are copied to where they belong") {
  ShardFixture f;
  const std::string content = Pattern(5 * 4096 + 100);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  std::string out(content.size(), '\0');
  std::vector<ShardReader::Segment> segments;
  for (size_t block = 6; block-- > 0;) {
    const size_t length = block == 5 ? 100 : 4096;
    const auto address = reinterpret_cast<uintptr_t>(out.data() + 4096 * block);
    segments.push_back({block, 50, address + 50, length - 50});
    segments.push_back({block, 0, address, 50});
  }
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(content), segments, &bad));
  CHECK(bad.empty());
  CHECK(out == content);
}

TEST_CASE("of a bad block nothing is copied, and its index is reported") {
  ShardFixture f;
  const std::string content = Pattern(6 * 4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  auto blocks = BlocksOf(content);
  blocks[4].hash ^= 1;
  blocks[1].hash ^= 1;
  std::string out(content.size(), '.');
  std::vector<ShardReader::Segment> segments;
  for (size_t i = 0; i < 6; ++i) {
    segments.push_back({i, 0, reinterpret_cast<uintptr_t>(out.data() + 4096 * i), 4096});
  }
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(blocks, segments, &bad));
  CHECK(bad == std::vector<size_t>{1, 4});
  CHECK(out.substr(4096, 4096) == std::string(4096, '.'));
  CHECK(out.substr(8192, 4096) == content.substr(8192, 4096));
}

TEST_CASE("blocks past the end of a cut file are bad, however large") {
  ShardFixture f;
  ScratchDir dir;
  Env& posix = DiskEnv();
  const std::string content = Pattern(2 * 4096);
  REQUIRE_OK(posix.WriteFile(dir / "s", content.substr(0, 4096 + 10), 0600));
  auto reader = Open(&posix, &f, dir / "s");
  auto blocks = BlocksOf(content);
  blocks.push_back({8192, UINT64_MAX - 4096, 0});
  blocks.push_back({UINT64_MAX - 4095, 4096, 0});
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(blocks, {}, &bad));
  CHECK(bad == std::vector<size_t>{1, 2, 3});
}

TEST_CASE("a file cut while it is open is bad, not an error") {
  ShardFixture f;
  ScratchDir dir;
  Env& posix = DiskEnv();
  const std::string content = Pattern(2 * 4096);
  REQUIRE_OK(posix.WriteFile(dir / "s", content, 0600));
  auto reader = Open(&posix, &f, dir / "s");
  std::filesystem::resize_file(dir / "s", 5000);
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(content), {}, &bad));
  CHECK(bad == std::vector<size_t>{1});
}

TEST_CASE("an I/O error is an error, not a bad block") {
  ShardFixture f;
  const std::string content = Pattern(8 * 4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  f.Fail("read", EIO);
  std::vector<size_t> bad;
  CHECK_ERRNO(reader->ReadBlocks(BlocksOf(content), {}, &bad), EIO);
  f.Fail("read", EIO);
  std::string data;
  CHECK_ERRNO(reader->Read(0, 10, &data), EIO);
  f.pool->Close();
  CHECK_ERRNO(reader->ReadBlocks(BlocksOf(content), {}, &bad), ECANCELED);
}

TEST_CASE("of a block that is not hashed only the length is checked") {
  ShardFixture f;
  const std::string content = Pattern(2 * 4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  std::string out(4096, '.');
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks({{0, 4096, 0, false}, {8192, 4096, 0, false}},
                                {{0, 0, reinterpret_cast<uintptr_t>(out.data()), 4096}}, &bad));
  CHECK(bad == std::vector<size_t>{1});
  CHECK(out == content.substr(0, 4096));
}

TEST_CASE("what direct I/O refuses is read without it") {
  ShardFixture f;
  const std::string content = Pattern(4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  f.Fail("read", EINVAL);
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(content), {}, &bad));
  CHECK(bad.empty());
  CHECK(f.env.injected() == 1);
}

TEST_CASE("what neither direct I/O nor a plain read gives is an error, and a plain file is opened once") {
  ShardFixture f;
  const std::string content = Pattern(4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  std::vector<size_t> bad;
  f.Fail("read", EINVAL);
  f.Fail("open", EMFILE);
  CHECK_ERRNO(reader->ReadBlocks(BlocksOf(content), {}, &bad), EMFILE);
  f.Fail("read", EINVAL, 2);
  CHECK_ERRNO(reader->ReadBlocks(BlocksOf(content), {}, &bad), EINVAL);
  f.Fail("read", EINVAL);
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(content), {}, &bad));
  CHECK(bad.empty());
  const auto trace = f.env.trace();
  CHECK(std::count(trace.begin(), trace.end(), "open /s") == 3);  // direct, refused, plain
  auto other = Open(&f.env, &f, "/s");
  {
    const Answered none("aligned_alloc", ENOMEM);
    std::string data;
    CHECK_ERRNO(other->Read(0, 4096, &data), ENOMEM);
    CHECK(data.empty());
  }
}

TEST_CASE("an empty segment needs no memory") {
  ShardFixture f;
  const std::string content = Pattern(4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  std::string out(4096, '.');
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(content), {{0, 0, 0, 0}, {0, 0, reinterpret_cast<uintptr_t>(out.data()), 4096}},
                                &bad));
  CHECK((out == content));
}

TEST_CASE("segments that leave their block, or memory, are refused before anything is read") {
  ShardFixture f;
  const std::string content = Pattern(4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  auto reader = Open(&f.env, &f, "/s");
  char byte = 0;
  const auto address = reinterpret_cast<uintptr_t>(&byte);
  std::vector<size_t> bad;
  for (const ShardReader::Segment& segment :
       {ShardReader::Segment{1, 0, address, 1}, ShardReader::Segment{0, 4096, address, 1},
        ShardReader::Segment{0, 1, address, UINT64_MAX}, ShardReader::Segment{0, 0, 0, 1},
        ShardReader::Segment{0, 0, 1, 1}}) {
    CHECK(reader->ReadBlocks(BlocksOf(content), {segment}, &bad).code() == Status::Code::kInvalidArgument);
  }
  REQUIRE_OK(reader->ReadBlocks({}, {}, &bad));
}

}  // namespace layerwise
