// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <random>

#include "block_runs.h"
#include "layerwise/posix_env.h"
#include "layerwise/shard_writer.h"
#include "pieces.h"
#include "shard_fixture.h"

namespace layerwise {

namespace {

using Blocks = std::vector<Plan::Block>;
using Segments = std::vector<Plan::Segment>;

// One tensor from `begin` of the data region on, cut into blocks of `block` bytes.
std::shared_ptr<const Plan> Spread(size_t begin, size_t length, size_t block) {
  Blocks blocks;
  Segments segments;
  const size_t end = RoundUp(begin + length, 4096);
  for (size_t at = 0; at < end; at += block) {
    const size_t size = std::min(block, end - at);
    const size_t from = std::max(at, begin);
    const size_t to = std::min(at + size, begin + length);
    if (from < to) segments.push_back({blocks.size(), from - at, 0, from - begin, to - from});
    blocks.push_back({4096 + at, size});
  }
  return ShardFixture::MakePlan(std::move(blocks), std::move(segments), 1);
}

std::unique_ptr<ShardWriter> OnDisk(Env* env, ShardFixture* f, std::shared_ptr<const Plan> plan,
                                    const std::string& path, bool direct = true) {
  std::unique_ptr<ShardWriter> writer;
  REQUIRE_OK(ShardWriter::Create(env, f->pool.get(), std::move(plan), path, 0600, direct, &writer));
  return writer;
}

std::string ReadBack(Env* env, const std::string& path) {
  std::string data;
  REQUIRE_OK(env->ReadFile(path, 1 << 30, &data));
  return data;
}

// What a plan with these tensors says that the file holds after its header.
std::string Expected(const Plan& plan, const std::vector<std::string>& contents) {
  std::string data(plan.end(), '\0');
  std::fill_n(data.begin(), 4096, 'H');
  for (size_t i = 0; i < plan.blocks().size(); ++i) {
    for (const Plan::Segment& segment : plan.segments(i)) {
      data.replace(plan.blocks()[i].offset + segment.block_offset, segment.length,
                   contents[segment.tensor].substr(segment.tensor_offset, segment.length));
    }
  }
  return data;
}

}  // namespace

SHARD_TEST_CASE("a congruent tensor is copied only in the sectors at its ends, wherever it lies") {
  constexpr size_t kLength = 300000;
  constexpr size_t kBlock = 65536;
  for (size_t shift = 0; shift < 4096; shift += (64 + 4 * (shift % 5)) * 64 / Rounds(64)) {
    CAPTURE(shift);
    ShardFixture f;
    Tensor tensor(Pattern(kLength, shift), shift);
    auto plan = Spread(shift, kLength, kBlock);
    auto writer = f.Writer(plan);
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    REQUIRE_OK(writer->Submit(0, plan->blocks().size()));
    REQUIRE(writer->Wait(10));
    REQUIRE_OK(writer->Finish(Header()));
    CHECK((f.Content() == Expected(*plan, {tensor.content()})));
    const size_t sector = writer->alignment().offset;
    const size_t ends = (sector - shift % sector) % sector + (shift + kLength) % sector;
    CHECK(writer->counts().bytes_copied == ends);
  }
}

SHARD_TEST_CASE("tensors of any size at any address reach file and hash unchanged") {
  ScratchDir dir;
  Env& posix = DiskEnv();
  std::mt19937 random(7);
  const auto pick = [&](size_t from, size_t to) { return from + random() % (to - from + 1); };
  for (int round = 0; round < Rounds(24); ++round) {
    CAPTURE(round);
    ShardFixture f(static_cast<int>(pick(1, 4)));
    const size_t block = 4096 * pick(1, 48);
    std::vector<std::unique_ptr<Tensor>> tensors;
    std::vector<std::string> contents;
    std::vector<uintptr_t> addresses;
    Blocks blocks;
    Segments segments;
    size_t cursor = 0;
    const size_t count = pick(1, 150);
    for (size_t t = 0; t < count; ++t) {
      const size_t length = pick(0, 3) == 0 ? pick(1, 100000) : pick(1, 700);
      contents.push_back(Pattern(length, 1000 * round + t));
      tensors.push_back(std::make_unique<Tensor>(contents.back(), pick(0, 511)));
      addresses.push_back(tensors.back()->address());
      cursor += pick(0, 2) == 0 ? pick(0, 9000) : 0;
      if (pick(0, 1) == 0) cursor += (addresses.back() - cursor) % 512;
      for (size_t done = 0; done < length;) {
        const size_t part = std::min(length - done, block - cursor % block);
        segments.push_back({cursor / block, cursor % block, t, done, part});
        done += part;
        cursor += part;
      }
    }
    for (size_t at = 0; at < cursor; at += block) {
      blocks.push_back({4096 + at, std::min(block, RoundUp(cursor, 4096) - at)});
    }
    auto plan = f.MakePlan(blocks, segments, count);
    const std::string expected = Expected(*plan, contents);
    for (bool direct : {true, false}) {
      const std::string path = dir / (std::to_string(round) + (direct ? "d" : "p"));
      auto writer = OnDisk(&posix, &f, plan, path, direct);
      REQUIRE_OK(writer->SetAddresses(addresses));
      REQUIRE_OK(writer->Submit(0, blocks.size()));
      REQUIRE(writer->Wait(60));
      REQUIRE_OK(writer->Finish(Header()));
      CHECK((ReadBack(&posix, path) == expected));
      for (size_t i = 0; i < blocks.size(); ++i) {
        CHECK(writer->BlockHash(i) == HashOf(expected.substr(blocks[i].offset, blocks[i].length)));
      }
    }
  }
}

TEST_CASE("a block is at most 64 runs, each aligned, whatever it is made of") {
  for (size_t count : {1, 31, 32, 63, 64, 65, 1000}) {
    for (size_t large : {0, 7, 60}) {
      CAPTURE(count);
      CAPTURE(large);
      std::vector<std::unique_ptr<Tensor>> tensors;
      auto addresses = std::make_unique<std::atomic<uintptr_t>[]>(count);
      std::vector<std::string> contents;
      Segments segments;
      size_t cursor = 0;
      for (size_t t = 0; t < count; ++t) {
        const size_t length = t < large ? 40000 : 1500;
        contents.push_back(Pattern(length, t));
        tensors.push_back(std::make_unique<Tensor>(contents.back(), cursor % 512));
        addresses[t] = tensors.back()->address();
        segments.push_back({0, cursor, t, 0, length});
        cursor += length + 36;
      }
      auto plan = ShardFixture::MakePlan({{4096, RoundUp(cursor, 4096)}}, segments, count);
      AlignedBuffer scratch;
      std::vector<iovec> runs;
      uint64_t copied = 0;
      REQUIRE_OK(CutBlock(*plan, 0, addresses.get(), {512, 512}, &scratch, &runs, &copied));
      CHECK(runs.size() <= kMostRuns);
      std::string data;
      for (const iovec& run : runs) {
        CHECK(run.iov_len > 0);
        CHECK(reinterpret_cast<uintptr_t>(run.iov_base) % 512 == 0);
        CHECK(run.iov_len % 512 == 0);
        data.append(static_cast<const char*>(run.iov_base), run.iov_len);
      }
      CHECK((data == Expected(*plan, contents).substr(4096)));
      // Large interiors are the last to be copied.
      const size_t left_alone = std::min(large, std::min<size_t>(count, 30)) * (40000 - 1024);
      CHECK(copied <= cursor - left_alone);
      std::string whole(cursor + 4096, 'x');
      CHECK(CopyBlock(*plan, 0, addresses.get(), whole.data()) == cursor - 36 * count);
      CHECK((whole.substr(0, data.size()) == data));
    }
  }
}

TEST_CASE("pieces of a write are dropped in any steps") {
  char memory[100];
  const std::vector<iovec> all = {{memory, 10}, {memory + 10, 0}, {memory + 10, 30}, {memory + 40, 60}};
  for (size_t step : {1, 7, 10, 40, 99, 100}) {
    Pieces left(all.data(), all.size());
    size_t done = 0;
    while (!left.empty()) {
      CHECK(left.data()[0].iov_base == memory + done);
      size_t sum = 0;
      for (int i = 0; i < left.count(); ++i) sum += left.data()[i].iov_len;
      CHECK(sum == 100 - done);
      const size_t n = std::min(step, left.bytes());
      left.Drop(n);
      done += n;
    }
    CHECK(done == 100);
  }
}

SHARD_TEST_CASE("a write that the kernel cuts short is continued, and fails where it cannot be") {
  ScratchDir dir;
  PosixEnv posix;
  // No more than this may be written, and the signal that says so is not deadly.
  constexpr size_t kLimit = 40 * 4096;
  const auto before_signal = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  for (bool direct : {true, false}) {
    ShardFixture f;
    Tensor tensor(Pattern(64 * 4096));
    auto plan = Spread(0, 64 * 4096, 32 * 4096);
    const std::string path = dir / (direct ? "d" : "p");
    auto writer = OnDisk(&posix, &f, plan, path, direct);
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    REQUIRE_OK(writer->Submit(0, 1));
    REQUIRE(writer->Wait(60));
    rlimit limit{kLimit, before.rlim_max};
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const Status submitted = writer->Submit(1, 1);
    const bool done = writer->Wait(60);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
    REQUIRE_OK(submitted);
    REQUIRE(done);
    CHECK_ERRNO(writer->error(), EFBIG);
    CHECK(writer->error().path() == path);
    CHECK_ERRNO(writer->Finish(Header()), EIO);
    // The first part of the second block went out before the kernel said no.
    CHECK((ReadBack(&posix, path).substr(4096, kLimit - 4096) == tensor.content().substr(0, kLimit - 4096)));
    CHECK(writer->counts().leased == 0);
  }
  std::signal(SIGXFSZ, before_signal);
}

SHARD_TEST_CASE("shards of a pool with buffers share disk and pool") {
  ScratchDir dir;
  Env& posix = DiskEnv();
  ShardFixture f(4, 12);
  constexpr size_t kBlocks = 40;
  std::vector<std::unique_ptr<Tensor>> tensors;
  std::vector<std::unique_ptr<ShardWriter>> writers;
  for (size_t i = 0; i < 5; ++i) {
    // Odd ones are gathered, even ones go out as they are.
    tensors.push_back(std::make_unique<Tensor>(Pattern(kBlocks * 4096, i), i % 2 == 0 ? 0 : 8));
    writers.push_back(OnDisk(&posix, &f, f.Simple(kBlocks), dir / std::to_string(i)));
    REQUIRE_OK(writers[i]->SetAddress(0, tensors[i]->address()));
  }
  for (size_t block = 0; block < kBlocks; ++block) {
    for (auto& writer : writers) REQUIRE_OK(writer->Submit(block, 1));
  }
  for (size_t i = 0; i < 5; ++i) {
    bool safe = false;
    REQUIRE_OK(writers[i]->Evacuate(0, kBlocks, 60, &safe));
    REQUIRE(safe);
    tensors[i]->Set(std::string(kBlocks * 4096, 'z'));
  }
  for (size_t i = 0; i < 5; ++i) {
    REQUIRE(writers[i]->Wait(60));
    REQUIRE_OK(writers[i]->Finish(Header()));
    CHECK((ReadBack(&posix, dir / std::to_string(i)) == Header() + Pattern(kBlocks * 4096, i)));
  }
  CHECK(f.buffers->in_use() == 4 * 4096);
}

SHARD_TEST_CASE("without hashes nothing is hashed and everything is written") {
  ShardFixture f(1, 16);
  Tensor tensor(Pattern(8 * 4096));
  auto writer = f.Writer(f.Simple(8));
  writer->SkipHashes();
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.002));
  REQUIRE_OK(writer->Submit(0, 8));
  size_t blocks = 0;
  REQUIRE_OK(writer->Append("tail", &blocks));
  bool safe = false;
  REQUIRE_OK(writer->Evacuate(0, 8, 60, &safe));
  CHECK(safe);
  REQUIRE(writer->Wait(60));
  CHECK(!writer->BlockHash(0).has_value());
  CHECK(!writer->BlockHash(7).has_value());
  std::vector<uint64_t> hashes = {1};
  REQUIRE_OK(writer->Hashes(&hashes));
  CHECK(hashes.empty());
  REQUIRE_OK(writer->Finish(Header()));
  CHECK((f.Content().substr(0, 9 * 4096) == Header() + tensor.content()));
}

TEST_CASE("a pool needs room for its bounce buffers, and takes no plan that exceeds them") {
  std::shared_ptr<BufferPool> buffers;
  REQUIRE_OK(BufferPool::Create(4 * 4096, &buffers));
  std::unique_ptr<WriterPool> pool;
  CHECK(WriterPool::Create({.depth = 5, .buffers = buffers, .block_bytes = 4096}, &pool).code() ==
        Status::Code::kInvalidArgument);
  CHECK(WriterPool::Create({.depth = 1, .buffers = buffers, .block_bytes = 100}, &pool).code() ==
        Status::Code::kInvalidArgument);
  CHECK(buffers->in_use() == 0);
  ShardFixture f(1, 4);
  std::unique_ptr<ShardWriter> writer;
  auto plan = ShardFixture::MakePlan({{4096, 8192}}, {}, 0);
  const Status refused = ShardWriter::Create(&f.env, f.pool.get(), plan, "/s", 0600, true, &writer);
  CHECK(refused.code() == Status::Code::kInvalidArgument);
  CHECK(refused.message().find("8192") != std::string::npos);
  FileInfo info;
  CHECK_ERRNO(f.disk.Stat("/s", &info), ENOENT);
}

}  // namespace layerwise
