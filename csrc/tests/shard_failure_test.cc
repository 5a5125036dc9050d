// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <future>
#include <new>
#include <thread>

#include "answers.h"
#include "layerwise/calls.h"
#include "layerwise/shard_writer.h"
#include "shard_fixture.h"

// Shards that fail, are given up, or whose writer ends.

namespace layerwise {

namespace {

size_t CountIn(const std::vector<std::string>& trace, const std::string& entry) {
  return static_cast<size_t>(std::count(trace.begin(), trace.end(), entry));
}

}  // namespace

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

SHARD_TEST_CASE("a sink that finds no memory for a block is told that it has failed, if it wants to know") {
  class Poor final : public BlockSink {
   public:
    bool StartBlock(size_t, AlignedBuffer*, BlockWrite*) override { throw std::bad_alloc(); }
    void FinishBlock(size_t, const BlockWrite&, Status status) override { told.set_value(status.error_number()); }
    void CancelBlock(size_t) override {}
    std::promise<int> told;
  };
  class Unconcerned final : public BlockSink {
   public:
    bool StartBlock(size_t, AlignedBuffer*, BlockWrite*) override { throw std::bad_alloc(); }
    void CancelBlock(size_t) override {}
  };
  ShardFixture f(1);
  Unconcerned other;
  f.pool->Submit(&other, 0, 1);
  Poor sink;
  f.pool->Submit(&sink, 0, 1);
  CHECK(sink.told.get_future().get() == ENOMEM);
}

SHARD_TEST_CASE("a failed flush is never tried again") {
  for (const char* operation : {"sync", "write"}) {
    ShardFixture f;
    Tensor tensor(Pattern(4096));
    auto writer = f.Submitted(&tensor, 1);
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

SHARD_TEST_CASE("memory for a bounce buffer, a tail or a header that is not there fails what needs it") {
  ShardFixture f(1);
  Tensor shifted(Pattern(4096), 1);
  auto writer = f.Writer(f.Simple(1));  // direct, so that a block of this tensor is copied
  REQUIRE_OK(writer->SetAddress(0, shifted.address()));
  size_t blocks = 1;
  {
    const Answered none("aligned_alloc", ENOMEM);
    CHECK_ERRNO(writer->Append("tail", &blocks), ENOMEM);
    CHECK(blocks == 0);
    REQUIRE_OK(writer->error());  // nothing has happened
  }
  if (writer->alignment().memory > 1) {  // not where files are mapped: nothing is copied there
    const Answered none("aligned_alloc", ENOMEM);
    REQUIRE_OK(writer->Submit(0, 1));
    REQUIRE(writer->Wait(10));
    CHECK_ERRNO(writer->error(), ENOMEM);
    CHECK(writer->counts().leased == 0);
    CHECK(writer->counts().bytes_written == 0);
  }
  Tensor tensor(Pattern(4096));
  auto finishing = f.Writer(f.Simple(1), "/t");
  REQUIRE_OK(finishing->SetAddress(0, tensor.address()));
  REQUIRE_OK(finishing->Submit(0, 1));
  REQUIRE(finishing->Wait(10));
  {
    const Answered none("aligned_alloc", ENOMEM);
    CHECK_ERRNO(finishing->Finish(Header()), ENOMEM);
  }
  CHECK_ERRNO(finishing->Finish(Header()), EIO);
  CHECK(CountIn(f.env.trace(), "sync /t") == 0);
}

SHARD_TEST_CASE("an abort does not wait for a flush longer than asked, and one that has ended leaves the file whole") {
  ShardFixture f(1);
  Tensor tensor(Pattern(4096));
  auto writer = f.Submitted(&tensor, 1);
  REQUIRE(writer->Wait(10));
  REQUIRE_OK(f.env.Delay("sync", "/s", 600));
  Status finished;
  std::thread finishing([&] { finished = writer->Finish(Header()); });
  while (CountIn(f.env.trace(), "sync /s") == 0) std::this_thread::yield();
  CHECK(!writer->Abort(0.01));
  CHECK(writer->Submit(0, 1).code() == Status::Code::kFailedPrecondition);
  size_t blocks = 0;
  CHECK(writer->Append("x", &blocks).code() == Status::Code::kFailedPrecondition);
  f.env.Clear();
  finishing.join();
  REQUIRE_OK(finished);
  CHECK(writer->Abort());
  CHECK((f.Content() == Header() + tensor.content()));
}

SHARD_TEST_CASE("abort cancels what is queued and waits for what runs") {
  ShardFixture f(1);
  Tensor tensor(Pattern(64 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Submitted(&tensor, 64);
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
  auto writer = f.Submitted(&tensor, 64);
  writer.reset();
  tensor.Set(std::string(64 * 4096, 'z'));
  CHECK(CountIn(f.env.trace(), "write /s") < 20);
}

SHARD_TEST_CASE("a closed pool fails what is queued") {
  ShardFixture f(1);
  Tensor tensor(Pattern(8 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.3));
  auto writer = f.Submitted(&tensor, 8);
  f.pool->Close();
  CHECK(writer->Wait(0));
  CHECK_ERRNO(writer->error(), ECANCELED);
}

SHARD_TEST_CASE("a call that does not return is named, and waited for no longer than asked") {
  ShardFixture f(1);
  Tensor tensor(Pattern(2 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 600));
  auto writer = f.Submitted(&tensor, 2);
  while (CallsUnderWay().empty()) std::this_thread::yield();
  CHECK(CallsUnderWay()[0].operation == std::string("write"));
  CHECK(CallsUnderWay()[0].path == "/s");
  CHECK(!writer->Abort(0.01));
  CHECK(!f.pool->Close(0.01));
  CHECK(!WriterPool::CloseAll());  // which does not wait for it again
  f.env.Clear();
  CHECK(writer->Abort());
  CHECK(CallsUnderWay().empty());
}

// The sanitizers' allocators have locks that a fork may leave held forever.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
SHARD_TEST_CASE("a forked child destroys a busy writer without waiting") {
  ShardFixture f(1);
  Tensor tensor(Pattern(8 * 4096));
  REQUIRE_OK(f.env.Delay("write", "/s", 0.01));
  auto writer = f.Submitted(&tensor, 8);
  std::thread waiter([&] { static_cast<void>(writer->Wait(10)); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    const bool left = writer->Abort(0);  // what is under way is the parent's
    writer.reset();
    Leave(left ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  waiter.join();
}
#endif

}  // namespace layerwise
