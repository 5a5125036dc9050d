#include <cerrno>
#include <chrono>
#include <thread>

#include "layerwise/hash.h"
#include "layerwise/shard_writer.h"
#include "shard_fixture.h"

namespace layerwise {

namespace {

constexpr size_t kBlocks = 64;

uint64_t HashOf(const std::string& data) { return Xxh3(data.data(), data.size()); }

// A writer with `room` buffers beside its one bounce buffer, on a file that takes a
// while for each write.
struct EvacuationFixture : ShardFixture {
  explicit EvacuationFixture(size_t room, double write_s = 0.002) : ShardFixture(1, 1 + room) {
    REQUIRE_OK(env.Delay("write", "/s", write_s));
    writer = Writer(Simple(kBlocks));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
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
  std::unique_ptr<ShardWriter> writer;
};

}  // namespace

SHARD_TEST_CASE("memory overwritten right after an evacuation never reaches the file") {
  EvacuationFixture f(kBlocks);
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  bool safe = false;
  REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 60, &safe));
  REQUIRE(safe);
  f.Overwrite(0, kBlocks);
  const ShardWriter::Counts counts = f.writer->counts();
  CHECK(counts.leased == 0);
  CHECK(counts.pending > kBlocks / 2);  // it did not wait for the file
  CHECK(counts.bytes_evacuated > kBlocks / 2 * 4096);
  CHECK(counts.bytes_evacuated <= kBlocks * 4096);
  CHECK(counts.bytes_copied == counts.bytes_evacuated);
  CHECK(f.writer->WaitLeases(0));
  f.CheckOriginal();
}

SHARD_TEST_CASE("layer by layer, each is safe when its own evacuation returns") {
  EvacuationFixture f(8);
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  for (size_t first = 0; first < kBlocks; first += 16) {
    bool safe = false;
    REQUIRE_OK(f.writer->Evacuate(first, 16, 60, &safe));
    REQUIRE(safe);
    f.Overwrite(first, 16);
    REQUIRE_OK(f.writer->Evacuate(first, 16, 60, &safe));  // again: nothing is left to do
    CHECK(safe);
  }
  CHECK(f.writer->counts().bytes_evacuated > 0);
  f.CheckOriginal();
}

SHARD_TEST_CASE("where the pool has no room, an evacuation waits for the writes") {
  for (size_t room : {0, 3}) {
    EvacuationFixture f(room, 0.0005);
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    bool safe = false;
    REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 60, &safe));
    REQUIRE(safe);
    f.Overwrite(0, kBlocks);
    CHECK(f.writer->counts().pending <= room);
    CHECK(f.writer->counts().bytes_evacuated <= (room + kBlocks / 4) * 4096);
    f.CheckOriginal();
  }
}

SHARD_TEST_CASE("an evacuation that is out of time is not safe") {
  EvacuationFixture f(0, 0.2);
  REQUIRE_OK(f.writer->Submit(0, 2));
  bool safe = true;
  REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 0, &safe));
  CHECK(!safe);
  CHECK(!f.writer->WaitLeases(0));
  CHECK(f.writer->counts().leased == 2);
  REQUIRE_OK(f.writer->Evacuate(2, 4, 0, &safe));  // others are in nobody's way
  CHECK(safe);
  f.writer->Abort();
  CHECK(f.writer->counts().leased == 0);
}

SHARD_TEST_CASE("an abort gives all memory of the pool back and lets an evacuation go") {
  EvacuationFixture f(kBlocks, 0.05);
  REQUIRE_OK(f.writer->Submit(0, kBlocks));
  bool safe = false;
  REQUIRE_OK(f.writer->Evacuate(8, kBlocks - 8, 60, &safe));
  CHECK(safe);
  CHECK(f.buffers->in_use() > 16 * 4096);
  bool let_go = false;
  std::thread aborting([&] { f.writer->Abort(); });
  REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 60, &let_go));
  aborting.join();
  CHECK(let_go);
  CHECK(f.buffers->in_use() == 4096);
  CHECK(f.writer->counts().pending == 0);
  CHECK(f.writer->counts().leased == 0);
  REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 0, &safe));
  CHECK(safe);
}

SHARD_TEST_CASE("a failed write and a closed pool give evacuated memory back") {
  for (bool close : {false, true}) {
    EvacuationFixture f(kBlocks, 0.02);
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    bool safe = false;
    REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 60, &safe));
    CHECK(safe);
    if (close) {
      f.pool->Close();
    } else {
      f.env.Clear();
      f.Fail("write", ENOSPC);
      REQUIRE(f.writer->Wait(60));
    }
    CHECK_ERRNO(f.writer->error(), close ? ECANCELED : ENOSPC);
    CHECK(f.writer->counts().leased == 0);
    CHECK(f.buffers->in_use() == 4096);
  }
}

SHARD_TEST_CASE("an evacuated block may be submitted again once it is complete") {
  EvacuationFixture f(kBlocks, 0.001);
  for (size_t round = 0; round < 3; ++round) {
    f.tensor.Set(Pattern(kBlocks * 4096, round));
    REQUIRE_OK(f.writer->Submit(0, kBlocks));
    bool safe = false;
    REQUIRE_OK(f.writer->Evacuate(0, kBlocks, 60, &safe));
    REQUIRE(safe);
    CHECK(f.writer->Submit(kBlocks - 1, 1).code() == Status::Code::kFailedPrecondition);
    f.Overwrite(0, kBlocks);
    REQUIRE(f.writer->Wait(60));
    CHECK(f.writer->BlockHash(3) == HashOf(Pattern(kBlocks * 4096, round).substr(3 * 4096, 4096)));
  }
  REQUIRE_OK(f.writer->Finish(Header()));
  CHECK((f.Content() == Header() + Pattern(kBlocks * 4096, 2)));
}

SHARD_TEST_CASE("appended data is nobody's lease") {
  EvacuationFixture f(0, 0.1);
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
  for (int round = 0; round < 5; ++round) {
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

}  // namespace layerwise
