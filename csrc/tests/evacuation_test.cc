// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <thread>

#include "layerwise/hash.h"
#include "layerwise/shard_writer.h"
#include "shard_fixture.h"

namespace layerwise {

namespace {

constexpr size_t kBlocks = 64;

// A writer whose pool has `room` buffers beside its one bounce buffer, and begins
// nothing before Open.
struct EvacuationFixture : ShardFixture {
  explicit EvacuationFixture(size_t room) : ShardFixture(1, 1 + room) {
    pool->Submit(&gate, 0, 1);
    gate.WaitForRuns(1);
    writer = Writer(Simple(kBlocks));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  }
  ~EvacuationFixture() {
    Open();
    writer.reset();
    pool->Close();
  }

  void Open() { gate.Open(); }

  bool Evacuate(size_t first, size_t count, double timeout_s = 60) {
    bool safe = false;
    REQUIRE_OK(writer->Evacuate(first, count, timeout_s, &safe));
    return safe;
  }

  // What the tensor held when it was submitted, in the file and under the hashes.
  void CheckOriginal() {
    REQUIRE(writer->Wait(60));
    REQUIRE_OK(writer->error());
    for (size_t i = 0; i < kBlocks; ++i) CHECK(writer->BlockHash(i) == HashOf(original.substr(4096 * i, 4096)));
    REQUIRE_OK(writer->Finish(Header()));
    CHECK((Content() == Header() + original));
    CHECK(writer->counts().completed == kBlocks);
    CHECK(buffers->in_use() == 4096);
  }

  void Overwrite(size_t first, size_t count) { std::fill_n(tensor.data() + 4096 * first, 4096 * count, 'z'); }

  const std::string original = Pattern(kBlocks * 4096);
  Tensor tensor{original};
  GatedSink gate;
  std::unique_ptr<ShardWriter> writer;
};

}  // namespace

SHARD_TEST_CASE("memory overwritten right after an evacuation never reaches the file") {
  EvacuationFixture f(kBlocks);
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  CHECK(f.writer->counts().leased == kBlocks);
  REQUIRE(f.Evacuate(0, kBlocks));
  f.Overwrite(0, kBlocks);
  const ShardWriter::Counts counts = f.writer->counts();
  CHECK(counts.leased == 0);
  CHECK(counts.pending == kBlocks);  // it did not wait for the file
  CHECK(counts.bytes_evacuated == kBlocks * 4096);
  CHECK(counts.bytes_copied == kBlocks * 4096);
  CHECK(f.writer->WaitLeases(0));
  CHECK(!f.writer->Wait(0));
  CHECK(f.writer->Submit(kBlocks - 1, 1).code() == Status::Code::kFailedPrecondition);
  f.Open();
  f.CheckOriginal();
}

SHARD_TEST_CASE("an evacuation races the writes, and the memory is safe when it returns") {
  EvacuationFixture f(8);
  REQUIRE_OK(f.env.Delay("write", "/s", 0.0005));
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  f.Open();
  for (size_t first = 0; first < kBlocks; first += 16) {
    REQUIRE(f.Evacuate(first, 16));
    f.Overwrite(first, 16);
    CHECK(f.Evacuate(first, 16, 0));  // nothing is left to do
  }
  f.CheckOriginal();
}

SHARD_TEST_CASE("an evacuation takes what has room from the back, and is not safe when out of time") {
  for (size_t room : {0, 3}) {
    EvacuationFixture f(room);
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    CHECK(!f.Evacuate(0, kBlocks, 0));
    CHECK(!f.Evacuate(0, kBlocks, 0.01));  // what is evacuated is not evacuated again
    CHECK(f.writer->counts().bytes_evacuated == room * 4096);
    CHECK(f.writer->counts().leased == kBlocks - room);
    CHECK(!f.writer->WaitLeases(0));
    if (room > 0) CHECK(f.Evacuate(kBlocks - room, room, 0));
    f.Open();
    REQUIRE(f.Evacuate(0, kBlocks));
    f.Overwrite(0, kBlocks);
    f.CheckOriginal();
  }
}

SHARD_TEST_CASE("only blocks of the range are evacuated and waited for") {
  EvacuationFixture f(kBlocks);
  REQUIRE_OK(f.writer->Submit(0, 20));
  REQUIRE_OK(f.writer->Submit(30, 10));
  CHECK(f.Evacuate(20, 10, 0));
  CHECK(f.writer->counts().bytes_evacuated == 0);
  REQUIRE(f.Evacuate(10, 25, 0));
  CHECK(f.writer->counts().bytes_evacuated == 15 * 4096);
  CHECK(f.writer->counts().leased == 15);
  f.Overwrite(10, 25);
  f.Open();
  REQUIRE(f.writer->Wait(60));
  for (size_t i : {0, 9, 10, 19, 30, 34, 35, 39}) {
    CHECK(f.writer->BlockHash(i) == HashOf(f.original.substr(4096 * i, 4096)));
  }
}

SHARD_TEST_CASE("without a buffer pool an evacuation waits for the writes") {
  ShardFixture f;
  Tensor tensor(Pattern(kBlocks * 4096));
  auto writer = f.Submitted(&tensor, kBlocks);
  bool safe = false;
  REQUIRE_OK(writer->Evacuate(0, kBlocks, 60, &safe));
  REQUIRE(safe);
  tensor.Set(std::string(kBlocks * 4096, 'z'));
  CHECK(writer->counts().completed == kBlocks);
  CHECK(writer->counts().bytes_evacuated == 0);
  REQUIRE_OK(writer->Finish(Header()));
  CHECK((f.Content() == Header() + Pattern(kBlocks * 4096)));
}

SHARD_TEST_CASE("an abort gives all memory of the pool back and lets an evacuation go") {
  EvacuationFixture f(16);
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  CHECK(f.Evacuate(kBlocks - 16, 16, 0));
  CHECK(f.buffers->in_use() == 17 * 4096);
  std::thread aborting([&] { f.writer->Abort(); });
  CHECK(f.Evacuate(0, kBlocks));
  aborting.join();
  CHECK(f.buffers->in_use() == 4096);
  CHECK(f.writer->counts().pending == 0);
  CHECK(f.writer->counts().leased == 0);
  CHECK(f.Evacuate(0, kBlocks, 0));
}

SHARD_TEST_CASE("a failed write and a closed pool give evacuated memory back") {
  for (bool close : {false, true}) {
    EvacuationFixture f(kBlocks);
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    REQUIRE(f.Evacuate(0, kBlocks, 0));
    if (!close) f.Fail("write", ENOSPC);
    std::thread closing([&] {
      if (close) f.pool->Close();
    });
    if (!close) f.Open();
    REQUIRE(f.writer->Wait(60));
    f.Open();
    closing.join();
    CHECK_ERRNO(f.writer->error(), close ? ECANCELED : ENOSPC);
    CHECK(f.writer->counts().leased == 0);
    CHECK(f.buffers->in_use() == 4096);
  }
}

SHARD_TEST_CASE("an evacuated block may be submitted again once it is complete") {
  EvacuationFixture f(kBlocks);
  for (size_t round = 0; round < 3; ++round) {
    const std::string content = Pattern(kBlocks * 4096, round);
    f.tensor.Set(content);
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    REQUIRE(f.Evacuate(0, kBlocks));
    f.Overwrite(0, kBlocks);
    f.Open();
    REQUIRE(f.writer->Wait(60));
    for (size_t i = 0; i < kBlocks; ++i) CHECK(f.writer->BlockHash(i) == HashOf(content.substr(4096 * i, 4096)));
  }
  CHECK(f.writer->counts().bytes_evacuated >= kBlocks * 4096);
  REQUIRE_OK(f.writer->Finish(Header()));
  CHECK((f.Content() == Header() + Pattern(kBlocks * 4096, 2)));
}

SHARD_TEST_CASE("appended data is nobody's lease") {
  EvacuationFixture f(0);
  size_t blocks = 0;
  REQUIRE_OK(f.writer->Append("state", &blocks));
  CHECK(f.writer->counts().pending == 1);
  CHECK(f.writer->counts().leased == 0);
  CHECK(f.writer->WaitLeases(0));
  bool safe = false;
  CHECK(f.writer->Evacuate(0, kBlocks + 1, 0, &safe).code() == Status::Code::kInvalidArgument);
}

SHARD_TEST_CASE("a lease ends only when the block is hashed too") {
  // Blocks that take long to hash and no time to write.
  constexpr size_t kLarge = 8 << 20;
  ShardFixture f(2);
  Tensor tensor(Pattern(4 * kLarge));
  std::vector<Plan::Block> blocks;
  std::vector<Plan::Segment> segments;
  for (size_t i = 0; i < 4; ++i) {
    blocks.push_back({4096 + i * kLarge, kLarge});
    segments.push_back({i, 0, 0, i * kLarge, kLarge});
  }
  auto plan = f.MakePlan(blocks, segments, 1);
  for (int round = 0; round < Rounds(5); ++round) {
    auto writer = f.Writer(plan, "/" + std::to_string(round));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    std::vector<uint64_t> expected;
    for (size_t i = 0; i < 4; ++i) expected.push_back(Xxh3(tensor.data() + i * kLarge, kLarge));
    REQUIRE_OK(writer->Submit(0, 4));
    REQUIRE(writer->WaitLeases(60));
    for (size_t i = 0; i < 4; ++i) std::fill_n(tensor.data() + i * kLarge + kLarge / 2, kLarge / 2, 'a' + round);
    REQUIRE(writer->Wait(60));
    for (size_t i = 0; i < 4; ++i) CHECK(writer->BlockHash(i) == expected[i]);
  }
}

SHARD_TEST_CASE("blocks in memory of the pool are not leased, and give it back when the last of them is written") {
  EvacuationFixture f(kBlocks);
  BufferPool::Buffer memory = f.buffers->TryAcquire(kBlocks * 4096);
  REQUIRE(memory);
  std::copy(f.original.begin(), f.original.end(), memory.data());
  REQUIRE_OK(f.writer->SetAddress(0, reinterpret_cast<uintptr_t>(memory.data())));
  REQUIRE_OK(f.writer->Submit(0, kBlocks, std::move(memory)));
  CHECK(f.writer->counts().leased == 0);
  CHECK(f.writer->WaitLeases(0));
  CHECK(f.buffers->in_use() == (1 + kBlocks) * 4096);
  bool safe = true;
  CHECK(f.writer->Evacuate(1, 2, 0, &safe).code() == Status::Code::kFailedPrecondition);
  CHECK(!safe);
  f.Open();
  f.CheckOriginal();
}

SHARD_TEST_CASE("an abort gives the memory of blocks that were not written back") {
  for (bool writing : {false, true}) {
    EvacuationFixture f(kBlocks);
    REQUIRE_OK(f.env.Delay("write", "/s", 0.005));
    BufferPool::Buffer memory = f.buffers->TryAcquire(kBlocks * 4096);
    REQUIRE(memory);
    REQUIRE_OK(f.writer->SetAddress(0, reinterpret_cast<uintptr_t>(memory.data())));
    REQUIRE_OK(f.writer->Submit(0, kBlocks, std::move(memory)));
    if (writing) f.Open();
    f.writer->Abort();
    CHECK(f.buffers->in_use() == 4096);
    BufferPool::Buffer late = f.buffers->TryAcquire(4096);
    REQUIRE_OK(f.writer->Submit(0, 1, std::move(late)));  // on an aborted writer: nothing is queued, nothing is kept
    CHECK(f.buffers->in_use() == 4096);
  }
}

}  // namespace layerwise
