#include "layerwise/shard_writer.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <new>
#include <thread>

#include "layerwise/calls.h"
#include "layerwise/hash.h"
#include "layerwise/posix_env.h"
#include "shard_fixture.h"

namespace layerwise {

namespace {

size_t CountIn(const std::vector<std::string>& trace, const std::string& entry) {
  return static_cast<size_t>(std::count(trace.begin(), trace.end(), entry));
}

}  // namespace

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
  auto writer = f.Writer(f.Simple(2));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 2));
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

SHARD_TEST_CASE("appended data lies behind the plan in padded, hashed blocks") {
  ShardFixture f;
  Tensor tensor(Pattern(4096));
  auto writer = f.Writer(f.Simple(1));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
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

SHARD_TEST_CASE("a pending block is not submitted again, and a wait ends at its timeout") {
  ShardFixture f(1);
  Tensor tensor(Pattern(4096));
  GatedSink gate;
  f.pool->Submit(&gate, 0, 1);
  gate.WaitForRuns(1);
  auto writer = f.Writer(f.Simple(1));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
  CHECK(writer->Submit(0, 1).code() == Status::Code::kFailedPrecondition);
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  CHECK(!writer->Wait(0));
  CHECK(!writer->Wait(-1));
  CHECK(!writer->BlockHash(0).has_value());
  CHECK(writer->counts().pending == 1);
  gate.Open();
  CHECK(writer->Wait(60));
}

SHARD_TEST_CASE("a failed block poisons the file and cancels the rest") {
  ShardFixture f(1);
  Tensor tensor(Pattern(16 * 4096));
  auto writer = f.Writer(f.Simple(16));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  f.Fail("write", ENOSPC);
  REQUIRE_OK(writer->Submit(0, 16));
  REQUIRE(writer->Wait(10));
  CHECK_ERRNO(writer->error(), ENOSPC);
  CHECK(writer->counts().completed == 0);
  CHECK(CountIn(f.env.trace(), "write /s") == 1);
  REQUIRE_OK(writer->Submit(0, 16));
  size_t blocks = 1;
  REQUIRE_OK(writer->Append("x", &blocks));
  CHECK(blocks == 0);
  CHECK(writer->counts().pending == 0);
  CHECK_ERRNO(writer->Finish(Header()), EIO);
  CHECK(writer->Finish(Header()).message().find("poisoned") != std::string::npos);
  writer->Abort();
  CHECK_ERRNO(writer->Finish(Header()), EIO);
  CHECK(CountIn(f.env.trace(), "sync /s") == 0);
}

SHARD_TEST_CASE("a thread that finds no memory fails its block, and goes on") {
  ShardFixture f(1);
  Tensor tensor(Pattern(4 * 4096));
  auto failing = f.Writer(f.Simple(4));
  REQUIRE_OK(failing->SetAddress(0, tensor.address()));
  f.NoMemory("write");
  REQUIRE_OK(failing->Submit(0, 4));
  REQUIRE(failing->Wait(10));
  CHECK_ERRNO(failing->error(), ENOMEM);
  CHECK(failing->counts().pending == 0);
  CHECK(failing->counts().leased == 0);
  CHECK_ERRNO(failing->Finish(Header()), EIO);
  auto next = f.Writer(f.Simple(4), "/t");
  REQUIRE_OK(next->SetAddress(0, tensor.address()));
  REQUIRE_OK(next->Submit(0, 4));
  REQUIRE(next->Wait(10));
  REQUIRE_OK(next->Finish(Header()));
  CHECK((f.Content("/t") == Header() + tensor.content()));
}

SHARD_TEST_CASE("a sink that finds no memory for a block is told that it has failed") {
  class Poor final : public BlockSink {
   public:
    bool StartBlock(size_t, AlignedBuffer*, BlockWrite*) override { throw std::bad_alloc(); }
    void FinishBlock(size_t, const BlockWrite&, Status status) override { told.set_value(status.error_number()); }
    void CancelBlock(size_t) override {}
    std::promise<int> told;
  };
  ShardFixture f(1);
  Poor sink;
  f.pool->Submit(&sink, 0, 1);
  CHECK(sink.told.get_future().get() == ENOMEM);
}

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

SHARD_TEST_CASE("a failed flush is never tried again") {
  for (const char* operation : {"sync", "write"}) {
    ShardFixture f;
    Tensor tensor(Pattern(4096));
    auto writer = f.Writer(f.Simple(1));
    REQUIRE_OK(writer->SetAddress(0, tensor.address()));
    REQUIRE_OK(writer->Submit(0, 1));
    REQUIRE(writer->Wait(10));
    f.Fail(operation, ENOSPC);
    CHECK_ERRNO(writer->Finish(Header()), ENOSPC);
    const Status again = writer->Finish(Header());
    CHECK_ERRNO(again, EIO);
    CHECK(again.message().find("poisoned") != std::string::npos);
    CHECK(CountIn(f.env.trace(), "sync /s") == (operation == std::string("sync") ? 1 : 0));
    CHECK_ERRNO(writer->error(), ENOSPC);
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

SHARD_TEST_CASE("abort cancels what is queued and waits for what runs") {
  ShardFixture f(1);
  Tensor tensor(Pattern(64 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Writer(f.Simple(64));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 64));
  writer->Abort();
  writer->Abort();
  CHECK(writer->Wait(0));
  CHECK(writer->counts().pending == 0);
  CHECK(CountIn(f.env.trace(), "write /s") < 10);
  CHECK_ERRNO(writer->error(), ECANCELED);
  CHECK_ERRNO(writer->Finish(Header()), ECANCELED);
  REQUIRE_OK(writer->Submit(0, 64));
  CHECK(writer->counts().pending == 0);
  FileInfo info;
  CHECK(f.disk.Stat("/s", &info).ok());
}

SHARD_TEST_CASE("destruction aborts") {
  ShardFixture f(2);
  Tensor tensor(Pattern(64 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Writer(f.Simple(64));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 64));
  writer.reset();
  tensor.Set(std::string(64 * 4096, 'z'));
  CHECK(CountIn(f.env.trace(), "write /s") < 20);
}

SHARD_TEST_CASE("a closed pool fails what is queued") {
  ShardFixture f(1);
  Tensor tensor(Pattern(8 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Writer(f.Simple(8));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 8));
  f.pool->Close();
  CHECK(writer->Wait(0));
  CHECK_ERRNO(writer->error(), ECANCELED);
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
  auto writer = f.Writer(f.Simple(4));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 4));
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

SHARD_TEST_CASE("a retired file is written over, and what is behind the new end is cut off") {
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

// -- files that are being made -------------------------------------------------------

SHARD_TEST_CASE("what is submitted before the file is made waits for it, and can be evacuated") {
  ShardFixture f(2, 6);
  REQUIRE_OK(f.disk.WriteFile("/old", Pattern(4096), 0600));
  REQUIRE_OK(f.env.Delay("reuse", "/old", 0.2));
  Tensor tensor(Pattern(4 * 4096));
  const std::string saved = tensor.content();
  auto writer = f.Over(f.Simple(4));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 4));
  CHECK(!writer->Wait(0.01));
  CHECK(writer->Finish(Header()).code() == Status::Code::kFailedPrecondition);
  bool safe = false;
  REQUIRE_OK(writer->Evacuate(0, 4, 0.05, &safe));
  CHECK(safe);
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
    REQUIRE_OK(f.env.Delay("make_dir", "/", 0.1));
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

SHARD_TEST_CASE("a call that does not return is named, and waited for no longer than asked") {
  ShardFixture f(1);
  Tensor tensor(Pattern(2 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Writer(f.Simple(2));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 2));
  while (CallsUnderWay().empty()) std::this_thread::yield();
  CHECK(CallsUnderWay()[0].operation == std::string("write"));
  CHECK(CallsUnderWay()[0].path == "/s");
  CHECK(!writer->Abort(0.01));
  CHECK(!f.pool->Close(0.01));
  CHECK(!WriterPool::CloseAll());  // which does not wait for it again
  CHECK(writer->Abort());
  CHECK(CallsUnderWay().empty());
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

// The sanitizers' allocators have locks that a fork may leave held for ever.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
SHARD_TEST_CASE("a forked child destroys a busy writer without waiting") {
  ShardFixture f(1);
  Tensor tensor(Pattern(8 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.01));
  auto writer = f.Writer(f.Simple(8));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 8));
  std::thread waiter([&] { static_cast<void>(writer->Wait(10)); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    writer.reset();
    _exit(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  waiter.join();
}
#endif

}  // namespace layerwise
