// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTS_SHARD_FIXTURE_H_
#define LAYERWISE_TESTS_SHARD_FIXTURE_H_

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fault_env.h"
#include "layerwise/hash.h"
#include "layerwise/shard_reader.h"
#include "layerwise/shard_writer.h"
#include "memory_env.h"
#include "rooted_env.h"
#include "scratch.h"

namespace layerwise {

inline uint64_t HashOf(const std::string& data) { return Xxh3(data.data(), data.size()); }

// Which backend the fixtures of the running test case get.
inline WriterPool::Backend backend_under_test = WriterPool::Backend::kPosix;

// Whether there is none here, which it says then.
inline bool SkipWithoutUring() {
  const Status probed = WriterPool::ProbeUring();
  if (!probed.ok()) MESSAGE("SKIP: io_uring is not to be had here: " << probed.ToString());
  return !probed.ok();
}

inline void RunOn(WriterPool::Backend backend, void (*test)()) {
  if (backend == WriterPool::Backend::kUring && SkipWithoutUring()) return;
  backend_under_test = backend;
  test();
  backend_under_test = WriterPool::Backend::kPosix;
}

// A test case that is run on each backend.
#define SHARD_TEST_CASE(name) SHARD_TEST_CASE_AS(name, DOCTEST_ANONYMOUS(shard_test_))
#define SHARD_TEST_CASE_AS(name, function)                                        \
  static void function();                                                         \
  TEST_CASE(name " (posix)") { RunOn(WriterPool::Backend::kPosix, function); }    \
  TEST_CASE(name " (uring)") { RunOn(WriterPool::Backend::kUring, function); }    \
  static void function()

// Notes its blocks, and holds the first until Open is called.
class GatedSink final : public BlockSink {
 public:
  bool StartBlock(size_t index, AlignedBuffer*, BlockWrite*) override {
    std::unique_lock lock(mutex_);
    ran_.push_back(index);
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    ended_ += 1;
    changed_.notify_all();
    return false;
  }

  void CancelBlock(size_t index) override {
    std::lock_guard lock(mutex_);
    cancelled_.push_back(index);
  }

  void Open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

  void WaitForRuns(size_t n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ran_.size() >= n; });
  }

  // Until every block that was started is over.
  void WaitForEnd() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_ == ran_.size(); });
  }

  std::vector<size_t> ran() const { return ran_; }
  std::vector<size_t> cancelled() const { return cancelled_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  size_t ended_ = 0;
  std::vector<size_t> ran_;
  std::vector<size_t> cancelled_;
};

// A tensor whose address modulo 4096 is `shift`.
class Tensor {
 public:
  explicit Tensor(const std::string& content, size_t shift = 0) : size_(content.size()), shift_(shift) {
    REQUIRE_OK(buffer_.Reserve(content.size() + shift));
    Set(content);
  }

  void Set(const std::string& content) { std::memcpy(data(), content.data(), content.size()); }
  char* data() { return buffer_.data() + shift_; }
  uintptr_t address() { return reinterpret_cast<uintptr_t>(data()); }
  std::string content() { return std::string(data(), size_); }

 private:
  AlignedBuffer buffer_;
  size_t size_;
  size_t shift_;
};

// A pool, a file system that can fail, and memory for tensors.
struct ShardFixture {
  explicit ShardFixture(int depth = 2) {
    REQUIRE_OK(WriterPool::Create({.backend = backend_under_test, .depth = depth}, &pool));
  }

  // With a pool of `pages` buffers of 4096 bytes; `depth` of them are bounce buffers.
  ShardFixture(int depth, size_t pages) {
    REQUIRE_OK(BufferPool::Create(4096 * pages, &buffers));
    REQUIRE_OK(WriterPool::Create(
        {.backend = backend_under_test, .depth = depth, .buffers = buffers, .block_bytes = 4096}, &pool));
  }

  static std::shared_ptr<const Plan> MakePlan(std::vector<Plan::Block> blocks, std::vector<Plan::Segment> segments,
                                              uint64_t tensors, uint64_t tail_offset = 0) {
    std::unique_ptr<Plan> plan;
    REQUIRE_OK(Plan::Create(std::move(blocks), std::move(segments), tensors, tail_offset, &plan));
    return plan;
  }

  // `blocks` blocks of 4096 bytes from offset 4096 on, each a part of tensor 0.
  static std::shared_ptr<const Plan> Simple(size_t blocks) {
    std::vector<Plan::Block> list;
    std::vector<Plan::Segment> segments;
    for (size_t i = 0; i < blocks; ++i) {
      list.push_back({4096 * (i + 1), 4096});
      segments.push_back({i, 0, 0, 4096 * i, 4096});
    }
    return MakePlan(std::move(list), std::move(segments), 1);
  }

  std::unique_ptr<ShardWriter> Writer(std::shared_ptr<const Plan> plan, const std::string& path = "/s",
                                      bool direct = true) {
    std::unique_ptr<ShardWriter> writer;
    REQUIRE_OK(ShardWriter::Create(&env, pool.get(), std::move(plan), path, 0600, direct, &writer));
    return writer;
  }

  // Of `blocks` blocks of the tensor, all of them queued.
  std::unique_ptr<ShardWriter> Submitted(Tensor* tensor, size_t blocks) {
    auto writer = Writer(Simple(blocks));
    REQUIRE_OK(writer->SetAddress(0, tensor->address()));
    REQUIRE_OK(writer->Submit(0, blocks));
    return writer;
  }

  // Made by the pool, over /old.
  std::unique_ptr<ShardWriter> Over(std::shared_ptr<const Plan> plan) {
    std::unique_ptr<ShardWriter> writer;
    ShardWriter::Target target;
    target.folder = "/";
    target.path = "/s";
    target.direct = true;
    target.spare = "/old";
    REQUIRE_OK(ShardWriter::Order(&env, pool.get(), std::move(plan), std::move(target), &writer));
    return writer;
  }

  void Fail(const std::string& operation, int error_number, int times = 1) {
    FaultPlan::Rule rule;
    rule.operation = operation;
    rule.error_number = error_number;
    rule.times = times;
    REQUIRE_OK(env.Fail(rule));
  }

  // The operation throws std::bad_alloc.
  void NoMemory(const std::string& operation, int times = 1) {
    FaultPlan::Rule rule;
    rule.operation = operation;
    rule.times = times;
    rule.no_memory = true;
    REQUIRE_OK(env.Fail(rule));
  }

  std::string Content(const std::string& path = "/s") {
    std::string data;
    REQUIRE_OK(disk.ReadFile(path, 1 << 30, &data));
    return data;
  }

  // What the shards are on: memory, or a real directory where LAYERWISE_TEST_DIR
  // names one (tests/vm does, so that these tests hold on each kind of device).
  MemoryEnv memory;
  ScratchDir scratch;
  RootedEnv rooted{&DiskEnv(), scratch.path()};
  Env& disk = std::getenv("LAYERWISE_TEST_DIR") == nullptr ? static_cast<Env&>(memory) : rooted;
  FaultEnv env{&disk};
  std::shared_ptr<BufferPool> buffers;
  std::unique_ptr<WriterPool> pool;
};

// The blocks of 4096 bytes of a file with this content.
inline std::vector<ShardReader::Block> BlocksOf(const std::string& content) {
  std::vector<ShardReader::Block> blocks;
  for (size_t offset = 0; offset < content.size(); offset += 4096) {
    const size_t length = std::min<size_t>(4096, content.size() - offset);
    blocks.push_back({offset, length, Xxh3(content.data() + offset, length)});
  }
  return blocks;
}

inline std::string Header(size_t n = 4096) { return std::string(n, 'H'); }

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_SHARD_FIXTURE_H_
