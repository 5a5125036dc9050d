// SPDX-License-Identifier: Apache-2.0
#include "layerwise/writer_pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <vector>

#include "answers.h"
#include "shard_fixture.h"

namespace layerwise {

SHARD_TEST_CASE("blocks run in the order in which they were submitted") {
  GatedSink sink;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  sink.Open();
  pool->Submit(&sink, 4, 3);
  pool->Submit(&sink, 0, 2);
  sink.WaitForRuns(5);
  pool->Close();
  CHECK(sink.ran() == std::vector<size_t>{4, 5, 6, 0, 1});
}

SHARD_TEST_CASE("withdrawn blocks get no call") {
  GatedSink sink, other;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  other.Open();
  pool->Submit(&sink, 0, 10);
  sink.WaitForRuns(1);
  pool->Submit(&other, 0, 1);
  CHECK(pool->Withdraw(&sink) == 9);
  CHECK(pool->Withdraw(&sink) == 0);
  sink.Open();
  other.WaitForRuns(1);
  pool->Close();
  CHECK(sink.ran() == std::vector<size_t>{0});
  CHECK(sink.cancelled().empty());
}

SHARD_TEST_CASE("closing cancels what is queued and waits for what runs") {
  GatedSink sink;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 2}, &pool));
  pool->Submit(&sink, 0, 4);
  // What StartBlock does itself goes one by one where there is one thread.
  sink.WaitForRuns(backend_under_test == WriterPool::Backend::kPosix ? 2 : 1);
  sink.Open();
  WriterPool::CloseAll();
  pool->Close();
  CHECK(sink.ran().size() + sink.cancelled().size() == 4);
  pool->Submit(&sink, 7, 1);
  CHECK(sink.cancelled().back() == 7);
}

SHARD_TEST_CASE("a pool is closed in time though a thread of it does not end, which finds its memory when it does") {
  GatedSink sink;
  std::shared_ptr<BufferPool> buffers;
  REQUIRE_OK(BufferPool::Create(4096, &buffers));
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create(
      {.backend = backend_under_test, .depth = 1, .buffers = buffers, .block_bytes = 4096}, &pool));
  pool->Submit(&sink, 0, 3);
  sink.WaitForRuns(1);
  CHECK(!pool->Close(0.01));
  CHECK(sink.cancelled() == std::vector<size_t>{1, 2});
  pool.reset();
  CHECK(buffers->in_use() == 4096);
  sink.Open();
  sink.WaitForEnd();
}

SHARD_TEST_CASE("errands are run in order beside blocks, and refused with the reason once the pool is closed") {
  GatedSink sink;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  pool->Submit(&sink, 0, 1);
  sink.WaitForRuns(1);
  std::vector<int> ran;
  std::promise<void> second;
  pool->Run([&](const Status& status) { ran.push_back(status.ok() ? 1 : -1); });
  pool->Run([&](const Status& status) {
    ran.push_back(status.ok() ? 2 : -2);
    second.set_value();
  });
  second.get_future().get();
  sink.Open();
  CHECK(pool->Close());
  pool->Run([&](const Status& status) { ran.push_back(status.error_number()); });
  CHECK(ran == std::vector<int>{1, 2, ECANCELED});
}

SHARD_TEST_CASE("errands that have not begun are refused when the pool is closed, though one does not return") {
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  std::promise<void> begun, go_on;
  std::vector<int> told;
  pool->Run([&](const Status&) {
    begun.set_value();
    go_on.get_future().wait();
  });
  pool->Run([&](const Status& status) { told.push_back(status.error_number()); });
  begun.get_future().wait();
  CHECK(!pool->Close(0.01));
  CHECK(told == std::vector<int>{ECANCELED});
  go_on.set_value();
  CHECK(pool->Close(30));
}

SHARD_TEST_CASE("held blocks are not started, are withdrawn, and are cancelled with the pool") {
  GatedSink sink, other;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  sink.Open();
  other.Open();
  pool->Hold(&sink);
  pool->Submit(&sink, 0, 4);
  pool->Submit(&other, 0, 1);
  other.WaitForRuns(1);
  CHECK(sink.ran().empty());
  size_t last = 0;
  REQUIRE(pool->TakeLast(&sink, 0, 4, &last));
  CHECK(last == 3);
  CHECK(pool->Withdraw(&sink) == 3);
  pool->Submit(&sink, 5, 2);
  pool->Release(&sink);
  sink.WaitForRuns(2);
  pool->Hold(&sink);
  pool->Submit(&sink, 8, 1);
  pool->Close();
  CHECK(sink.ran() == std::vector<size_t>{5, 6});
  CHECK(sink.cancelled() == std::vector<size_t>{8});
}

SHARD_TEST_CASE("threads of a pool yield to the threads that train") {
  struct Sink final : BlockSink {
    bool StartBlock(size_t, AlignedBuffer*, BlockWrite*) override {
      seen.set_value(getpriority(PRIO_PROCESS, 0));  // of the calling thread
      return false;
    }
    void CancelBlock(size_t) override {}
    std::promise<int> seen;
  } sink;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  pool->Submit(&sink, 0, 1);
  CHECK(sink.seen.get_future().get() == std::min(getpriority(PRIO_PROCESS, 0) + 5, 19));
  pool->Close();
}

SHARD_TEST_CASE("a pool has a sane depth") {
  std::unique_ptr<WriterPool> pool;
  for (const int depth : {0, 1025}) {
    const Status status = WriterPool::Create({.backend = backend_under_test, .depth = depth}, &pool);
    CHECK(status.code() == Status::Code::kInvalidArgument);
  }
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 3}, &pool));
  CHECK(pool->depth() == 3);
}

SHARD_TEST_CASE("a pool whose threads can't be started is refused, and its errands are told so") {
  std::unique_ptr<WriterPool> pool, other;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 2}, &pool));
  std::vector<int> told;
  {
    const NoThreads none;
    CHECK_ERRNO(WriterPool::Create({.backend = backend_under_test, .depth = 2}, &other), EAGAIN);
    pool->Run([&](const Status& status) { told.push_back(status.error_number()); });
  }
  CHECK(other == nullptr);
  CHECK(told == std::vector<int>{EAGAIN});
  std::promise<bool> ran;
  pool->Run([&](const Status& status) { ran.set_value(status.ok()); });  // the next one tries again
  CHECK(ran.get_future().get());
  CHECK(pool->Close());
}

SHARD_TEST_CASE("what asks for nothing gets nothing") {
  GatedSink sink;
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 1}, &pool));
  sink.Open();
  pool->Submit(&sink, 3, 0);
  pool->Release(&sink);  // was not held
  pool->Hold(&sink);
  pool->Release(&sink);  // holds nothing
  size_t index = 0;
  CHECK(!pool->TakeLast(&sink, 0, 10, &index));
  CHECK(pool->Close());
  pool->Hold(&sink);  // in a closed pool
  pool->Submit(&sink, 1, 1);
  CHECK(sink.ran().empty());
  CHECK(sink.cancelled() == std::vector<size_t>{1});
}

TEST_CASE("bounce buffers have a sane size") {
  std::unique_ptr<WriterPool> pool;
  std::shared_ptr<BufferPool> buffers;
  REQUIRE_OK(BufferPool::Create(1 << 20, &buffers));
  for (const size_t bytes : {size_t{0}, size_t{4095}, size_t{1} << 63}) {
    const Status status = WriterPool::Create({.depth = 4, .buffers = buffers, .block_bytes = bytes}, &pool);
    CHECK(status.code() == Status::Code::kInvalidArgument);
    CHECK(status.message().find("expected a multiple") != std::string::npos);
  }
  CHECK(buffers->in_use() == 0);
}

// The sanitizers' allocators have locks that a fork may leave held forever.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
SHARD_TEST_CASE("a forked child destroys the pool without waiting for threads it lacks") {
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = 2}, &pool));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    CHECK(pool->Close(0));  // nothing to wait for: its threads are the parent's
    CHECK(WriterPool::CloseAll(0));
    pool.reset();
    Leave(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}
#endif

}  // namespace layerwise
