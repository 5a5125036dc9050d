#include "layerwise/buffer_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "scratch.h"

namespace layerwise {

namespace {

std::shared_ptr<BufferPool> MakePool(size_t bytes) {
  std::shared_ptr<BufferPool> pool;
  REQUIRE_OK(BufferPool::Create(bytes, &pool));
  return pool;
}

}  // namespace

TEST_CASE("buffers are aligned, disjoint, bounded, and come back") {
  auto pool = MakePool(4 * 4096 - 1);
  CHECK(pool->capacity() == 4 * 4096);
  auto a = pool->TryAcquire(1);
  auto b = pool->TryAcquire(4097);
  auto c = pool->TryAcquire(4096);
  REQUIRE((a && b && c));
  CHECK(a.size() == 1);
  CHECK(reinterpret_cast<uintptr_t>(b.data()) % kAlign == 0);
  CHECK(pool->in_use() == 4 * 4096);
  CHECK(!pool->TryAcquire(1));
  std::memset(a.data(), 1, a.size());
  std::memset(b.data(), 2, b.size());
  std::memset(c.data(), 3, c.size());
  CHECK(a.data()[0] == 1);
  CHECK(b.data()[4096] == 2);
  b.Release();
  b.Release();
  CHECK(!b);
  CHECK(pool->in_use() == 2 * 4096);
  a.Release();
  c = BufferPool::Buffer();
  CHECK(pool->in_use() == 0);
  CHECK(pool->peak() == 4 * 4096);
  CHECK(pool->TryAcquire(4 * 4096));  // the pieces are one again
}

TEST_CASE("a wait ends when a buffer comes back, or at its timeout") {
  auto pool = MakePool(2 * 4096);
  auto held = pool->TryAcquire(8192);
  CHECK(!pool->Acquire(4096, 0.01));
  CHECK(!pool->Acquire(2 * 4096 + 1, 1e9));  // it can never fit
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    held.Release();
  });
  CHECK(pool->Acquire(8192, 60));
  other.join();
}

TEST_CASE("the mapping lives as long as a buffer") {
  auto pool = MakePool(4096);
  auto held = pool->TryAcquire(4096);
  pool.reset();
  std::memset(held.data(), 1, held.size());
  CHECK(held.data()[4095] == 1);
}

TEST_CASE("a pool has bytes, and no more than there is address space") {
  std::shared_ptr<BufferPool> pool;
  CHECK(BufferPool::Create(0, &pool).code() == Status::Code::kInvalidArgument);
  CHECK_ERRNO(BufferPool::Create(SIZE_MAX, &pool), ENOMEM);
  CHECK_ERRNO(BufferPool::Create(SIZE_MAX / 2, &pool), ENOMEM);
}

TEST_CASE("many threads share a pool") {
  auto pool = MakePool(16 * 4096);
  std::vector<std::thread> threads;
  std::vector<int> clashes(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 500; ++i) {
        auto buffer = pool->Acquire(1 + (i * 4099 + t * 977) % (6 * 4096), 60);
        std::memset(buffer.data(), static_cast<int>(t), buffer.size());
        if (buffer.data()[buffer.size() / 2] != static_cast<char>(t)) ++clashes[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(clashes == std::vector<int>(4));
  CHECK(pool->in_use() == 0);
}

#if !defined(__SANITIZE_THREAD__)
TEST_CASE("a forked child drops a pool and buffers that others wait for") {
  auto pool = MakePool(4096);
  auto held = pool->TryAcquire(4096);
  std::thread waiter([&] { static_cast<void>(pool->Acquire(4096, 60)); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    held.Release();
    pool.reset();
    _exit(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  held.Release();
  waiter.join();
}
#endif

}  // namespace layerwise
