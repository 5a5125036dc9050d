// SPDX-License-Identifier: Apache-2.0
#include "layerwise/buffer_pool.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "answers.h"
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

namespace {

struct MemoryFile {
  MemoryFile() : fd(memfd_create("layerwise-test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) { REQUIRE(fd >= 0); }
  ~MemoryFile() { close(fd); }
  const int fd;
};

std::shared_ptr<BufferPool> MakeShared(int file, size_t bytes, uint64_t* begin) {
  std::shared_ptr<BufferPool> pool;
  REQUIRE_OK(BufferPool::CreateShared(file, bytes, begin, &pool));
  return pool;
}

bool Invalid(const Status& status) { return status.code() == Status::Code::kInvalidArgument; }

}  // namespace

TEST_CASE("a shared pool: what one side stages the other takes up by its place, and gives back") {
  MemoryFile file;
  uint64_t begin = 1;
  auto owner = MakeShared(file.fd, 4 * 4096 - 1, &begin);
  CHECK(begin == 0);
  CHECK(owner->capacity() == 4 * 4096);
  const int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  REQUIRE(wake >= 0);
  std::shared_ptr<BufferPool> other;
  REQUIRE_OK(BufferPool::Attach(file.fd, begin, owner->capacity(), wake, &other));
  auto first = owner->TryAcquire(1);
  auto staged = owner->TryAcquire(5000);
  REQUIRE(staged);
  CHECK(staged.place() == 4096);
  const std::string data = Pattern(staged.size());
  std::memcpy(staged.data(), data.data(), data.size());

  BufferPool::Buffer taken;
  REQUIRE_OK(other->Adopt(staged.place(), staged.size(), &taken));
  CHECK(std::string(taken.data(), taken.size()) == data);
  CHECK(other->in_use() == 2 * 4096);
  CHECK(other->TakeReturned().empty());
  uint64_t count = 0;
  CHECK(eventfd_read(wake, &count) != 0);
  taken.Release();
  CHECK(eventfd_read(wake, &count) == 0);
  CHECK(other->TakeReturned() == std::vector<uint64_t>{4096});
  CHECK(other->TakeReturned().empty());
  CHECK(other->in_use() == 0);
  CHECK(owner->in_use() == 3 * 4096);  // the owner hears of it from whoever reads the places
  CHECK(owner->TakeReturned().empty());
  close(wake);
}

TEST_CASE("what is no free buffer of a shared pool is refused") {
  MemoryFile file;
  uint64_t begin = 0;
  auto first = MakeShared(file.fd, 4096, &begin);
  auto owner = MakeShared(file.fd, 4 * 4096, &begin);
  CHECK(begin == 4096);  // after the other
  std::shared_ptr<BufferPool> other;
  REQUIRE_OK(BufferPool::Attach(file.fd, begin, 4 * 4096, -1, &other));
  BufferPool::Buffer middle;
  REQUIRE_OK(other->Adopt(begin + 4096, 4097, &middle));
  BufferPool::Buffer no;
  CHECK(Invalid(other->Adopt(begin + 4096, 1, &no)));          // taken
  CHECK(Invalid(other->Adopt(begin, 2 * 4096, &no)));          // in part
  CHECK(Invalid(other->Adopt(begin + 1, 1, &no)));             // not aligned
  CHECK(Invalid(other->Adopt(0, 4096, &no)));                  // before it
  CHECK(Invalid(other->Adopt(begin + 3 * 4096, 4097, &no)));   // beyond it
  CHECK(Invalid(other->Adopt(begin + 4 * 4096, 1, &no)));
  CHECK(Invalid(other->Adopt(begin, 0, &no)));
  CHECK(Invalid(other->Adopt(UINT64_MAX - 4095, 4096, &no)));
  CHECK(Invalid(other->Adopt(begin, SIZE_MAX, &no)));
  CHECK(!no);
  BufferPool::Buffer before;
  BufferPool::Buffer after;
  REQUIRE_OK(other->Adopt(begin, 4096, &before));
  REQUIRE_OK(other->Adopt(begin + 3 * 4096, 4096, &after));
  middle.Release();
  before.Release();
  after.Release();
  CHECK(other->TryAcquire(4 * 4096));  // the pieces are one again
}

TEST_CASE("a shared pool is made only in a memory file, and mapped only where nobody can cut it short") {
  MemoryFile file;
  std::shared_ptr<BufferPool> pool;
  uint64_t begin = 0;
  CHECK(Invalid(BufferPool::CreateShared(file.fd, 0, &begin, &pool)));
  CHECK_ERRNO(BufferPool::CreateShared(-1, 4096, &begin, &pool), EBADF);
  CHECK_ERRNO(BufferPool::CreateShared(file.fd, SIZE_MAX, &begin, &pool), ENOMEM);
  REQUIRE(ftruncate(file.fd, 8192) == 0);
  CHECK(Invalid(BufferPool::Attach(file.fd, 0, 4096, -1, &pool)));  // not sealed yet
  REQUIRE_OK(BufferPool::CreateShared(file.fd, 4096, &begin, &pool));
  CHECK(begin == 8192);
  CHECK(ftruncate(file.fd, 4096) != 0);
  CHECK(Invalid(BufferPool::Attach(file.fd, 0, 0, -1, &pool)));
  CHECK(Invalid(BufferPool::Attach(file.fd, 0, 4095, -1, &pool)));
  CHECK(Invalid(BufferPool::Attach(file.fd, 1, 4096, -1, &pool)));
  CHECK(Invalid(BufferPool::Attach(file.fd, 8192, 8192, -1, &pool)));
  CHECK(Invalid(BufferPool::Attach(file.fd, UINT64_MAX - 4095, 4096, -1, &pool)));
  CHECK_ERRNO(BufferPool::Attach(-1, 0, 4096, -1, &pool), EBADF);
  ScratchDir scratch;
  const int disk = open((scratch / "file").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  REQUIRE(disk >= 0);
  CHECK_ERRNO(BufferPool::CreateShared(disk, 4096, &begin, &pool), EINVAL);
  close(disk);
}

TEST_CASE("a shared pool for which there is no memory, or no room to map it, is refused and leaves nothing mapped") {
  std::shared_ptr<BufferPool> pool;
  uint64_t begin = 0;
  MemoryFile file;
  const auto mapped = [] {
    std::ifstream maps("/proc/self/maps");
    int count = 0;
    for (std::string line; std::getline(maps, line);) count += line.find("memfd:") != std::string::npos;
    return count;
  };
  const int before = mapped();
  struct Case {
    const char* call;
    int error;
    int expected;
  };
  for (const Case& each : {Case{"fallocate", ENOSPC, ENOMEM}, Case{"fallocate", EIO, EIO}, Case{"fstat", EIO, EIO},
                           Case{"mmap", ENOMEM, ENOMEM}, Case{"MADV_DONTFORK", ENOMEM, ENOMEM}}) {
    CAPTURE(each.call);
    const Answered answered(each.call, each.error);
    CHECK_ERRNO(BufferPool::CreateShared(file.fd, 8192, &begin, &pool), each.expected);
    CHECK(pool == nullptr);
    CHECK(mapped() == before);
  }
  {
    const Answered interrupted("fallocate", EINTR);
    REQUIRE_OK(BufferPool::CreateShared(file.fd, 8192, &begin, &pool));
  }
  std::shared_ptr<BufferPool> other;
  const Answered answered("fstat", EIO);
  CHECK_ERRNO(BufferPool::Attach(file.fd, begin, 8192, -1, &other), EIO);
  CHECK(other == nullptr);
  CHECK_ERRNO(BufferPool::CreateShared(-1, 8192, &begin, &other), EBADF);
  CHECK_ERRNO(BufferPool::CreateShared(file.fd, static_cast<size_t>(INT64_MAX) - 8192, &begin, &other), ENOMEM);
}

// The sanitizers' allocators have locks that a fork may leave held forever.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
TEST_CASE("a shared pool is not mapped in a forked child, and the other side is another process") {
  MemoryFile file;
  uint64_t begin = 0;
  auto owner = MakeShared(file.fd, 2 * 4096, &begin);
  auto staged = owner->TryAcquire(4096);
  std::memset(staged.data(), 7, staged.size());
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    unsigned char seen = 0;
    if (mincore(staged.data(), 4096, &seen) == 0) Leave(1);
    std::shared_ptr<BufferPool> other;
    BufferPool::Buffer taken;
    if (!BufferPool::Attach(file.fd, begin, owner->capacity(), -1, &other).ok()) Leave(2);
    if (!other->Adopt(staged.place(), 4096, &taken).ok()) Leave(3);
    if (taken.data()[4095] != 7) Leave(4);
    taken.data()[0] = 8;
    staged.Release();
    owner.reset();
    Leave(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(staged.data()[0] == 8);
}

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
    Leave(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  held.Release();
  waiter.join();
}
#endif

}  // namespace layerwise
