// SPDX-License-Identifier: Apache-2.0
#include "layerwise/shard_writer.h"

#include <cerrno>
#include <thread>

#include "shard_fixture.h"

namespace layerwise {

SHARD_TEST_CASE("aligned blocks are written from the tensor's own memory") {
  ShardFixture f;
  Tensor tensor(Pattern(3 * 4096));
  auto writer = f.Writer(f.Simple(3));
  CHECK(writer->direct());
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 3));
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(writer->Finish(Header()));
  CHECK(f.Content() == Header() + tensor.content());
  CHECK(writer->counts().bytes_copied == 0);
  CHECK(writer->counts().bytes_written == 4 * 4096);
  for (size_t i = 0; i < 3; ++i) CHECK(writer->BlockHash(i) == HashOf(tensor.content().substr(i * 4096, 4096)));
}

SHARD_TEST_CASE("misaligned memory passes a buffer when the file is direct, and only then") {
  for (bool direct : {true, false}) {
    ShardFixture f;
    Tensor tensor(Pattern(4096), 64);
    auto writer = f.Writer(f.Simple(1), "/s", direct);
    CHECK(writer->direct() == direct);
    REQUIRE_OK(writer->SetAddresses({tensor.address()}));
    REQUIRE_OK(writer->Submit(0, 1));
    REQUIRE(writer->Wait(10));
    REQUIRE_OK(writer->Finish(Header()));
    CHECK(f.Content() == Header() + tensor.content());
    const bool misaligned = tensor.address() % writer->alignment().memory != 0;
    CHECK(writer->counts().bytes_copied == (misaligned ? 4096 : 0));
    if (&f.disk == &f.memory) CHECK(misaligned == direct);
  }
}

SHARD_TEST_CASE("a block of several segments is gathered, with zeros in between") {
  ShardFixture f(1);
  Tensor first(Pattern(1000, 1), 8), second(Pattern(3000, 2), 24), filler(std::string(8193, 'x'));
  auto plan = f.MakePlan({{4096, 8192}, {12288, 4096}, {16384, 4096}},
                         {{0, 0, 2, 0, 8192}, {1, 10, 0, 0, 1000}, {1, 1096, 1, 0, 2000}, {2, 0, 1, 2000, 1000}}, 3);
  auto writer = f.Writer(plan);
  REQUIRE_OK(writer->SetAddresses({first.address(), second.address(), filler.address() + 1}));
  REQUIRE_OK(writer->Submit(0, 3));
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(writer->Finish(Header()));
  std::string block(4096, '\0');
  block.replace(10, 1000, first.content());
  block.replace(1096, 2000, second.content().substr(0, 2000));
  CHECK(f.Content().substr(12288, 4096) == block);
  CHECK(f.Content().substr(16384, 4096) == second.content().substr(2000) + std::string(3096, '\0'));
  CHECK(writer->BlockHash(1) == HashOf(block));
}

SHARD_TEST_CASE("a complete block may be submitted again, and its hash is replaced") {
  ShardFixture f;
  Tensor tensor(Pattern(8192, 1));
  auto writer = f.Submitted(&tensor, 2);
  REQUIRE(writer->Wait(10));
  const auto before = writer->BlockHash(1);
  tensor.Set(Pattern(8192, 2));
  REQUIRE_OK(writer->Submit(1, 1));
  REQUIRE(writer->Wait(10));
  CHECK(writer->BlockHash(1) != before);
  CHECK(writer->BlockHash(1) == HashOf(tensor.content().substr(4096)));
  CHECK(writer->counts().submitted == 3);
  CHECK(writer->counts().completed == 3);
  REQUIRE_OK(writer->Finish(Header()));
  CHECK(f.Content().substr(8192) == tensor.content().substr(4096));
}

SHARD_TEST_CASE("appended data lies after the plan in padded, hashed blocks") {
  ShardFixture f;
  Tensor tensor(Pattern(4096));
  auto writer = f.Submitted(&tensor, 1);
  const std::string data = Pattern(5000, 3);
  size_t blocks = 0;
  REQUIRE_OK(writer->Append(data, &blocks));
  CHECK(blocks == 2);
  REQUIRE_OK(writer->Append("", &blocks));
  CHECK(blocks == 0);
  REQUIRE_OK(writer->Append("x", &blocks));
  CHECK(blocks == 1);
  REQUIRE(writer->Wait(10));
  std::vector<uint64_t> hashes;
  REQUIRE_OK(writer->Hashes(&hashes));
  const std::string padded = data + std::string(8192 - 5000, '\0');
  CHECK(hashes == std::vector<uint64_t>{HashOf(tensor.content()), HashOf(padded.substr(0, 4096)),
                                        HashOf(padded.substr(4096)), HashOf("x" + std::string(4095, '\0'))});
  REQUIRE_OK(writer->Finish(Header()));
  CHECK(f.Content() == Header() + tensor.content() + padded + "x" + std::string(4095, '\0'));
  CHECK(writer->counts().bytes_copied == 5001);
}

SHARD_TEST_CASE("a shard without tensors appends at the tail offset") {
  ShardFixture f;
  size_t blocks = 0;
  auto nowhere = f.Writer(f.MakePlan({}, {}, 0), "/n");
  CHECK(nowhere->Append("x", &blocks).code() == Status::Code::kInvalidArgument);
  auto writer = f.Writer(f.MakePlan({}, {}, 0, 8192));
  REQUIRE_OK(writer->Append("x", &blocks));
  REQUIRE(writer->Wait(10));
  CHECK(writer->Finish(Header(12288)).code() == Status::Code::kInvalidArgument);
  REQUIRE_OK(writer->Finish(Header(8192)));
  CHECK(f.Content() == Header(8192) + "x" + std::string(4095, '\0'));
}

SHARD_TEST_CASE("misuse is refused and changes nothing") {
  ShardFixture f;
  Tensor tensor(Pattern(8192));
  auto writer = f.Writer(f.Simple(2));
  CHECK(writer->Submit(0, 1).code() == Status::Code::kFailedPrecondition);
  CHECK(writer->SetAddress(1, 1).code() == Status::Code::kInvalidArgument);
  CHECK(writer->SetAddress(0, 1).code() == Status::Code::kInvalidArgument);
  CHECK(writer->SetAddresses({1}).code() == Status::Code::kInvalidArgument);
  CHECK(writer->SetAddresses({}).code() == Status::Code::kInvalidArgument);
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  CHECK(writer->Submit(1, 2).code() == Status::Code::kInvalidArgument);
  CHECK(writer->Submit(SIZE_MAX, 2).code() == Status::Code::kInvalidArgument);
  REQUIRE_OK(writer->Submit(0, 1));
  REQUIRE(writer->Wait(10));
  std::vector<uint64_t> hashes;
  CHECK(writer->Hashes(&hashes).code() == Status::Code::kFailedPrecondition);
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  REQUIRE_OK(writer->Submit(1, 1));
  REQUIRE(writer->Wait(10));
  CHECK(writer->Finish("short").code() == Status::Code::kInvalidArgument);
  CHECK(writer->Finish(Header(8192)).code() == Status::Code::kInvalidArgument);
  CHECK(!writer->BlockHash(2).has_value());
  REQUIRE_OK(writer->Finish(Header()));
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  CHECK(writer->Submit(0, 1).code() == Status::Code::kFailedPrecondition);
  writer->Abort();
  CHECK(writer->error().ok());
  std::unique_ptr<ShardWriter> again;
  CHECK_ERRNO(ShardWriter::Create(&f.env, f.pool.get(), f.Simple(1), "/s", 0600, true, &again), EEXIST);
}

SHARD_TEST_CASE("the times of blocks are those of their last start and end") {
  ShardFixture f;
  Tensor tensor(Pattern(2 * 4096));
  auto writer = f.Writer(f.Simple(2));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
  REQUIRE(writer->Wait(10));
  auto times = writer->times();
  REQUIRE(times.size() == 2);
  CHECK(times[0].started > 0);
  CHECK(times[0].ended >= times[0].started);
  CHECK(times[1].started == 0);
  CHECK(times[1].ended == 0);
  REQUIRE_OK(writer->SetAddress(0, 0));  // not known any more
  CHECK(writer->Submit(1, 1).code() == Status::Code::kFailedPrecondition);
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
  REQUIRE(writer->Wait(10));
  CHECK(writer->times()[0].started >= times[0].ended);
}

SHARD_TEST_CASE("a pending block is not submitted again, and a wait ends at its timeout") {
  ShardFixture f(1);
  Tensor tensor(Pattern(4096));
  GatedSink gate;
  f.pool->Submit(&gate, 0, 1);
  gate.WaitForRuns(1);
  auto writer = f.Submitted(&tensor, 1);
  CHECK(writer->Submit(0, 1).code() == Status::Code::kFailedPrecondition);
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  CHECK(!writer->Wait(0));
  CHECK(!writer->Wait(-1));
  CHECK(!writer->BlockHash(0).has_value());
  CHECK(writer->counts().pending == 1);
  gate.Open();
  CHECK(writer->Wait(60));
}

SHARD_TEST_CASE("several threads use one writer") {
  ShardFixture f(4);
  Tensor tensor(Pattern(64 * 4096));
  auto writer = f.Writer(f.Simple(64));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  std::vector<std::thread> threads;
  std::vector<Status> results(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      size_t blocks = 0;
      for (size_t i = 0; i < 16 && results[t].ok(); ++i) results[t] = writer->Submit(16 * t + i, 1);
      if (results[t].ok()) results[t] = writer->Append("tail", &blocks);
      while (!writer->Wait(0.001)) static_cast<void>(writer->counts());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Status& result : results) CHECK(result.ok());
  REQUIRE(writer->Wait(10));
  CHECK(writer->counts().completed == 68);
  std::thread aborting([&] { writer->Abort(); });
  const Status finished = writer->Finish(Header());
  aborting.join();
  const bool one_won = finished.ok() == writer->error().ok();
  CHECK(one_won);
}

SHARD_TEST_CASE("a finished shard survives power loss once its directory is synced") {
  ShardFixture f;
  if (&f.disk != &f.memory) return;  // only memory can lose power here
  Tensor tensor(Pattern(4 * 4096));
  auto writer = f.Submitted(&tensor, 4);
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(writer->Finish(Header()));
  REQUIRE_OK(f.env.SyncDir("/"));
  for (uint64_t seed = 0; seed < 20; ++seed) {
    auto after = f.memory.Crash(f.memory.LogSize(), seed, CrashPolicy::kRandom);
    std::string data;
    REQUIRE_OK(after->ReadFile("/s", 1 << 20, &data));
    CHECK(data == Header() + tensor.content());
  }
}

SHARD_TEST_CASE("a real disk takes a shard by direct I/O") {
  ScratchDir dir;
  Env& env = DiskEnv();
  ShardFixture f;
  Tensor tensor(Pattern(3 << 20), 512), odd(Pattern(5000, 7), 64);
  std::vector<Plan::Block> blocks;
  std::vector<Plan::Segment> segments;
  for (size_t i = 0; i < 3; ++i) {
    blocks.push_back({4096 + (i << 20), 1 << 20});
    segments.push_back({i, 0, 0, i << 20, 1 << 20});
  }
  blocks.push_back({4096 + (3 << 20), 8192});
  segments.push_back({3, 100, 1, 0, 5000});
  std::unique_ptr<ShardWriter> writer;
  REQUIRE_OK(ShardWriter::Create(&env, f.pool.get(), f.MakePlan(blocks, segments, 2), dir / "s", 0600, true, &writer));
  REQUIRE_OK(writer->SetAddresses({tensor.address(), odd.address()}));
  REQUIRE_OK(writer->Submit(0, 4));
  REQUIRE(writer->Wait(60));
  REQUIRE_OK(writer->Finish(Header()));
  std::string data;
  REQUIRE_OK(env.ReadFile(dir / "s", 8 << 20, &data));
  CHECK(data == Header() + tensor.content() + std::string(100, '\0') + odd.content() + std::string(3092, '\0'));
}

}  // namespace layerwise
