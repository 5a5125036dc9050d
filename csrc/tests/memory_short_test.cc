// SPDX-License-Identifier: Apache-2.0
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "answers.h"
#include "layerwise/calls.h"
#include "layerwise/hash_job.h"
#include "layerwise/posix_env.h"
#include "shard_fixture.h"

// Memory that ends at any allocation of a call: the call says so, by std::bad_alloc or ENOMEM, nothing of it is half
// done, nothing waits forever for what will not come, and the same call succeeds once there is memory.

namespace layerwise {

namespace {

struct Outcome {
  Status status;        // that was returned, or ENOMEM if it threw
  bool thrown = false;
  bool met = false;     // whether memory was short at all
};

// Calls `action`, whose allocation number `left` fails.
template <typename Action>
Outcome With(long left, const Action& action) {
  Outcome outcome;
  const ShortOfMemory none(left);
  try {
    outcome.status = action();
  } catch (const std::bad_alloc&) {
    outcome.thrown = true;
    outcome.status = Status::NoMemory();
  }
  outcome.met = none.met();
  return outcome;
}

// Calls `action` so that its first allocation fails, then its second, and so on, until all succeed. `check` sees what
// each that met no memory returned. How often that was.
int Sweep(const std::function<Status()>& action, const std::function<void(const Status&)>& check) {
  for (int left = 0; left < 1000; ++left) {
    const Outcome outcome = With(left, action);
    if (!outcome.met) {
      REQUIRE_OK(outcome.status);
      return left;
    }
    check(outcome.status);
  }
  REQUIRE_MESSAGE(false, "it never has memory enough");
  return 0;
}

bool SignalsCome() {
  sigset_t blocked;
  REQUIRE(pthread_sigmask(SIG_SETMASK, nullptr, &blocked) == 0);
  return sigismember(&blocked, SIGINT) == 0;
}

}  // namespace

SHARD_TEST_CASE("a pool that finds no memory is not made, and signals come as before") {
  std::unique_ptr<WriterPool> pool;
  const auto create = [&] { return WriterPool::Create({.backend = backend_under_test, .depth = 2}, &pool); };
  const int failures = Sweep(create, [&](const Status& status) {
    CHECK_ERRNO(status, ENOMEM);
    CHECK(pool == nullptr);
    CHECK(SignalsCome());
  });
  CHECK(failures > 3);
  REQUIRE(pool != nullptr);
  CHECK(pool->Close());
}

SHARD_TEST_CASE("a shard that finds no memory when it is ordered leaves no file, and no errand that knows it") {
  ShardFixture f;
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<ShardWriter> writer;
  const auto plan = f.Simple(2);
  const auto order = [&] {
    ShardWriter::Target target;
    target.folder = dir.path();
    target.path = dir / "s";
    Status status = ShardWriter::Order(&env, f.pool.get(), plan, std::move(target), &writer);
    if (!status.ok()) return status;
    REQUIRE(writer->Wait(30));
    return writer->error();
  };
  const int failures = Sweep(order, [&](const Status& status) {
    CHECK_ERRNO(status, ENOMEM);
    CHECK(SignalsCome());
    writer.reset();
    FileInfo info;
    CHECK_ERRNO(env.Stat(dir / "s", &info), ENOENT);
  });
  CHECK(failures > 3);
  Tensor tensor(Pattern(2 * 4096));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 2));
  REQUIRE(writer->Wait(30));
  REQUIRE_OK(writer->Finish(Header()));
  std::string content;
  REQUIRE_OK(env.ReadFile(dir / "s", 1 << 20, &content));
  CHECK((content == Header() + tensor.content()));
}

SHARD_TEST_CASE("blocks that find no memory when they are submitted are not pending, and may be submitted again") {
  const std::string content = Pattern(3 * 4096);
  int thrown = 0;
  bool met = true;
  for (long left = 0; met; ++left) {
    ShardFixture f(1, 8);
    auto writer = f.Writer(f.Simple(3));
    BufferPool::Buffer memory;
    const auto fill = [&] {
      memory = f.buffers->TryAcquire(3 * 4096);
      REQUIRE(memory);
      std::copy(content.begin(), content.end(), memory.data());
      REQUIRE_OK(writer->SetAddress(0, reinterpret_cast<uintptr_t>(memory.data())));
    };
    fill();
    const Outcome outcome = With(left, [&] { return writer->Submit(0, 3, std::move(memory)); });
    met = outcome.met;
    if (outcome.thrown) {
      thrown += 1;
      REQUIRE_OK(writer->error());
      CHECK(writer->counts().submitted == 0);
      CHECK(writer->counts().leased == 0);
      CHECK(writer->Wait(0));
      CHECK(f.buffers->in_use() == 4096);  // the bounce buffer
      fill();
      REQUIRE_OK(writer->Submit(0, 3, std::move(memory)));
    }
    REQUIRE(writer->Wait(30));
    // The queue of the pool is the last to want memory: without it the blocks have failed.
    if (writer->error().ok()) {
      REQUIRE_OK(writer->Finish(Header()));
      CHECK((f.Content() == Header() + content));
    } else {
      CHECK(met);
      CHECK_ERRNO(writer->error(), ENOMEM);
    }
    CHECK(f.buffers->in_use() == 4096);
  }
  CHECK(thrown > 2);
}

SHARD_TEST_CASE("a queue without memory for a range of blocks tells each of them") {
  class Told final : public BlockSink {
   public:
    bool StartBlock(size_t, AlignedBuffer*, BlockWrite*) override { return false; }
    void FinishBlock(size_t index, const BlockWrite&, Status status) override {
      told.push_back({index, status.error_number()});
    }
    void CancelBlock(size_t) override {}
    std::vector<std::pair<size_t, int>> told;
  };
  ShardFixture f;
  Told sink;
  {
    const ShortOfMemory none(0);
    f.pool->Submit(&sink, 5, 2);
    CHECK(none.met());
  }
  CHECK(sink.told.size() == 2);
  CHECK(sink.told.front() == std::pair<size_t, int>{5, ENOMEM});
  CHECK(sink.told.back() == std::pair<size_t, int>{6, ENOMEM});
}

SHARD_TEST_CASE("what could not be appended for want of memory is no part of what is appended next") {
  const std::string first(8192, 'a'), second(8192, 'b');
  int thrown = 0;
  bool met = true;
  for (long left = 0; met; ++left) {
    ShardFixture f(1);
    auto writer = f.Writer(f.MakePlan({}, {}, 0, 4096));
    size_t blocks = 0;
    const Outcome outcome = With(left, [&] { return writer->Append(first, &blocks); });
    met = outcome.met;
    if (outcome.thrown) {
      thrown += 1;
      CHECK(writer->counts().submitted == 0);
      REQUIRE_OK(writer->Append(second, &blocks));
    }
    REQUIRE(writer->Wait(30));
    if (writer->error().ok()) {
      const std::string& expected = outcome.thrown ? second : first;
      REQUIRE_OK(writer->Finish(Header()));
      CHECK((f.Content() == Header() + expected));
      CHECK(writer->BlockHash(0) == HashOf(expected));
    } else {
      CHECK(met);
      CHECK_ERRNO(writer->error(), ENOMEM);
    }
  }
  CHECK(thrown > 2);
}

SHARD_TEST_CASE("an evacuation without memory leaves each block written once, or failed, and waits for none in vain") {
  bool met = true;
  for (long left = 0; met; ++left) {
    ShardFixture f(1, 8);
    GatedSink gate;
    f.pool->Submit(&gate, 0, 1);
    gate.WaitForRuns(1);
    Tensor tensor(Pattern(4 * 4096));
    auto writer = f.Submitted(&tensor, 4);
    bool safe = false;
    const Outcome outcome = With(left, [&] { return writer->Evacuate(1, 2, 0, &safe); });
    met = outcome.met;
    gate.Open();
    CHECK(outcome.status.ok() == !outcome.thrown);
    REQUIRE(writer->Wait(30));
    CHECK(writer->WaitLeases(0));
    if (writer->error().ok()) {
      REQUIRE_OK(writer->Finish(Header()));
      CHECK((f.Content() == Header() + tensor.content()));
    } else {
      CHECK(met);
      CHECK_ERRNO(writer->error(), ENOMEM);
    }
    writer.reset();
    CHECK(f.buffers->in_use() == 4096);
    f.pool->Close();
  }
}

TEST_CASE("a buffer pool that finds no memory for its books loses no room") {
  std::shared_ptr<BufferPool> pool;
  REQUIRE_OK(BufferPool::Create(4 * 4096, &pool));
  BufferPool::Buffer buffer;
  Sweep(
      [&] {
        buffer = pool->TryAcquire(4096);
        return Status::Ok();
      },
      [&](const Status&) { CHECK(pool->in_use() == 0); });
  CHECK(buffer);
  buffer.Release();
  // In the middle of the room, so that what is left is in two pieces.
  Sweep([&] { return pool->Adopt(4096, 4096, &buffer); }, [&](const Status&) { CHECK(pool->in_use() == 0); });
  CHECK(buffer);
  buffer.Release();
  CHECK(pool->TryAcquire(4 * 4096));  // all of it, in one piece
}

TEST_CASE("a call that finds no memory to be known by is made without") {
  const std::string path = "/s";
  CHECK(CallsUnderWay().empty());  // and the list of them is there, whichever test comes first
  const ShortOfMemory none(0);
  const OngoingCall call("write", path);
  CHECK(none.met());
  CHECK(CallsUnderWay().empty());
}

TEST_CASE("a call is as long as it has been under way") {
  const OngoingCall call("write", "/s");
  const auto calls = CallsUnderWay();
  REQUIRE(calls.size() == 1);
  CHECK(calls[0].Seconds() >= 0);
  CHECK(calls[0].Seconds() < 3600);
}

TEST_CASE("a read without memory is an error, or done, and the reader goes on") {
  ShardFixture f;
  const std::string content = Pattern(3 * 4096);
  REQUIRE_OK(f.disk.WriteFile("/s", content, 0600));
  std::unique_ptr<ShardReader> reader;
  REQUIRE_OK(ShardReader::Open(&f.env, f.pool.get(), "/s", false, &reader));
  std::vector<ShardReader::Block> blocks;
  std::vector<ShardReader::Segment> segments;
  std::string out(content.size(), '-');
  for (uint64_t i = 0; i < 3; ++i) {
    blocks.push_back({4096 * i, 4096, HashOf(content.substr(4096 * i, 4096))});
    segments.push_back({i, 0, reinterpret_cast<uintptr_t>(out.data()) + 4096 * i, 4096});
  }
  std::vector<size_t> bad;
  const int failures = Sweep([&] { return reader->ReadBlocks(blocks, segments, &bad); },
                             [&](const Status& status) {
                               CHECK_ERRNO(status, ENOMEM);
                               CHECK(bad.empty());
                             });
  CHECK(failures > 3);
  CHECK((out == content));
}

// The sanitizers start no thread in a child of a process that has several.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a process that can't start a thread hashes by itself, and hears signals as before") {
  const std::string data = Pattern(100000);
  const uint64_t expected = Xxh3(data.data(), data.size());
  const pid_t child = fork();  // in which no helper was started yet
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    bool good = true;
    const auto hash = [&] {
      HashJob job({{data.data(), data.size()}, {data.data(), data.size()}});
      const auto& hashes = job.Hashes();
      good = good && SignalsCome() && hashes == std::vector<uint64_t>{expected, expected};
      return Status::Ok();
    };
    {
      const NoThreads none;
      static_cast<void>(hash());
    }
    Sweep(hash, [&](const Status&) { good = good && SignalsCome(); });
    static_cast<void>(hash());
    Leave(good ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
#endif

}  // namespace layerwise
