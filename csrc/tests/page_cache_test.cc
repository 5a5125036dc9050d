// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/magic.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "shard_fixture.h"

namespace layerwise {

namespace {

// A file whose memory and disk say different things. As long as `in_memory`, its pages are in the page cache.
class TwoFaced final : public EnvWrapper {
 public:
  using EnvWrapper::EnvWrapper;

  Status NewReadableFile(const std::string&, bool direct, std::unique_ptr<ReadableFile>* file) override {
    std::unique_ptr<ReadableFile> face;
    Status status = target()->NewReadableFile(direct ? "/disk" : "/memory", direct, &face);
    if (status.ok()) *file = std::make_unique<Face>(std::move(face), in_memory);
    return status;
  }

  double in_memory = 1;

 private:
  class Face final : public ReadableFile {
   public:
    Face(std::unique_ptr<ReadableFile> base, double cached) : base_(std::move(base)), cached_(cached) {}
    uint64_t size() const override { return base_->size(); }
    bool direct() const override { return base_->direct(); }
    DirectIoAlignment alignment() const override { return base_->alignment(); }
    Status Pread(void* data, size_t n, uint64_t offset, size_t* got) override {
      return base_->Pread(data, n, offset, got);
    }
    double Cached() override { return cached_; }
    Status Close() override { return base_->Close(); }

   private:
    const std::unique_ptr<ReadableFile> base_;
    const double cached_;
  };
};

std::unique_ptr<WriterPool> PoolThatReads(WriterPool::Reads reads) {
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.depth = 2, .reads = reads}, &pool));
  return pool;
}

}  // namespace

TEST_CASE("blocks come out of the page cache where that holds most of the file, and where it was asked for") {
  ShardFixture f;
  TwoFaced env(&f.disk);
  const std::string memory = Pattern(3 * 4096 + 10);
  REQUIRE_OK(f.disk.WriteFile("/memory", memory, 0600));
  REQUIRE_OK(f.disk.WriteFile("/disk", std::string(memory.size(), '.'), 0600));
  const auto reads = [&](WriterPool::Reads how, double in_memory, bool direct) {
    env.in_memory = in_memory;
    const auto pool = PoolThatReads(how);
    std::unique_ptr<ShardReader> reader;
    REQUIRE_OK(ShardReader::Open(&env, pool.get(), "/s", direct, &reader));
    std::string out(memory.size(), '-');
    std::vector<size_t> bad;
    REQUIRE_OK(reader->ReadBlocks({{0, out.size(), 0, false}},
                                  {{0, 0, reinterpret_cast<uintptr_t>(out.data()), out.size()}}, &bad));
    CHECK(bad.empty());
    const auto counts = pool->read_counts();
    CHECK(counts.read == out.size());
    CHECK(counts.cached == (reader->cached() ? out.size() : 0));
    CHECK((out == memory) == (reader->cached() || how == WriterPool::Reads::kPlain || !direct));
    return reader->cached();
  };
  using enum WriterPool::Reads;
  CHECK(reads(kAuto, 1, true));
  CHECK(reads(kAuto, 0.9, true));
  CHECK_FALSE(reads(kAuto, 0.5, true));
  CHECK_FALSE(reads(kAuto, 1, false));  // all of it goes through the page cache anyway
  CHECK_FALSE(reads(kDirect, 1, true));
  CHECK_FALSE(reads(kPlain, 1, true));
}

TEST_CASE("a block that is wrong in the page cache is read from the disk, and bad only if it is wrong there too") {
  ShardFixture f;
  TwoFaced env(&f.disk);
  const std::string disk = Pattern(4 * 4096);
  std::string memory = disk;
  memory[4096] ^= 1;
  memory.resize(3 * 4096 + 1);  // and the last block is cut there
  REQUIRE_OK(f.disk.WriteFile("/memory", memory, 0600));
  REQUIRE_OK(f.disk.WriteFile("/disk", disk, 0600));
  const auto pool = PoolThatReads(WriterPool::Reads::kAuto);
  std::unique_ptr<ShardReader> reader;
  REQUIRE_OK(ShardReader::Open(&env, pool.get(), "/s", true, &reader));
  REQUIRE(reader->cached());
  std::string out(disk.size(), '-');
  std::vector<ShardReader::Segment> segments;
  for (size_t i = 0; i < 4; ++i) {
    segments.push_back({i, 0, reinterpret_cast<uintptr_t>(out.data() + 4096 * i), 4096});
  }
  std::vector<size_t> bad;
  REQUIRE_OK(reader->ReadBlocks(BlocksOf(disk), segments, &bad));
  CHECK(bad.empty());
  CHECK(out == disk);
  out.assign(out.size(), '-');
  auto blocks = BlocksOf(disk);
  blocks[1].hash ^= 1;
  REQUIRE_OK(reader->ReadBlocks(blocks, segments, &bad));
  CHECK(bad == std::vector<size_t>{1});
  CHECK(out.substr(4096, 4096) == std::string(4096, '-'));
}

TEST_CASE("the kernel says what of a file is in the page cache") {
  if (OnNvm()) return;  // there is none
  ScratchDir dir;
  Env& posix = DiskEnv();
  REQUIRE_OK(posix.WriteFile(dir / "s", Pattern(300 * 4096 + 1), 0600));
  REQUIRE_OK(posix.WriteFile(dir / "empty", "", 0600));
  const auto share = [&](const char* name) {
    std::unique_ptr<ReadableFile> file;
    REQUIRE_OK(posix.NewReadableFile(dir / name, true, &file));
    return file->Cached();
  };
  std::string data;
  REQUIRE_OK(posix.ReadFile(dir / "s", 1 << 30, &data));
  CHECK(share("s") == 1);
  CHECK(share("empty") == 0);
  const int fd = open((dir / "s").c_str(), O_RDONLY);
  REQUIRE(fd >= 0);
  uint64_t type = 0;
  REQUIRE_OK(posix.FileSystem(dir / "", &type));
  REQUIRE(fsync(fd) == 0);
  REQUIRE(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
  close(fd);
  if (type == TMPFS_MAGIC) return;  // it has nothing else
  CHECK(share("s") == 0);
}

}  // namespace layerwise
