// SPDX-License-Identifier: Apache-2.0
#include <liburing.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "shard_fixture.h"

// "Not now" of io_uring_enter (EAGAIN, EBUSY, EINTR) is no failure: the write is offered again.

namespace layerwise {

namespace {

// What io_uring_submit does not take, as if the kernel had no room for the request.
struct Refusals {
  std::atomic<int> error{0};
  std::atomic<int> left{0};   // how many submissions of a write are still refused
  std::atomic<int> asked{0};  // how many submissions of a write there were
};
Refusals refusals;

bool LastIsWrite(const io_uring* ring) {
  const uint8_t opcode = ring->sq.sqes[(ring->sq.sqe_tail - 1) & ring->sq.ring_mask].opcode;
  return opcode == IORING_OP_WRITEV || opcode == IORING_OP_WRITE_FIXED;
}

// Writes blocks of a string to a file, one after another.
class StringSink final : public BlockSink {
 public:
  StringSink(WritableFile* file, const std::string& data, size_t block) : file_(file), data_(data), block_(block) {}

  bool StartBlock(size_t index, AlignedBuffer*, BlockWrite* write) override {
    write->file = file_;
    write->path = &path_;
    write->offset = index * block_;
    write->length = block_;
    write->runs = {{const_cast<char*>(data_.data()) + index * block_, block_}};
    write->hashed = true;
    return true;
  }
  void FinishBlock(size_t, const BlockWrite&, Status status) override { Note(std::move(status)); }
  void CancelBlock(size_t) override { Note(Status::IoError(ECANCELED, "cancelled", path_)); }

  // The first error of all blocks.
  Status Write(WriterPool* pool) {
    left_ = data_.size() / block_;
    done_ = std::promise<void>();
    first_ = Status::Ok();
    pool->Submit(this, 0, left_);
    REQUIRE(done_.get_future().wait_for(std::chrono::seconds(30)) == std::future_status::ready);
    return first_;
  }

 private:
  void Note(Status status) {  // on the one thread of the pool
    if (first_.ok()) first_ = std::move(status);
    if (--left_ == 0) done_.set_value();
  }

  const std::string path_ = "blocks";
  WritableFile* const file_;
  const std::string& data_;
  const size_t block_;
  size_t left_ = 0;
  Status first_;
  std::promise<void> done_;
};

std::unique_ptr<WriterPool> UringPool(int depth) {
  std::unique_ptr<WriterPool> pool;
  REQUIRE_OK(WriterPool::Create({.backend = WriterPool::Backend::kUring, .depth = depth}, &pool));
  return pool;
}

bool SkipWithoutUring() {
  const Status probed = WriterPool::ProbeUring();
  if (!probed.ok()) MESSAGE("SKIP: io_uring is not to be had here: " << probed.ToString());
  return !probed.ok();
}

// Writes eight blocks while the first submissions are refused, then once more. The first error, and whether all
// bytes got to the file the first time.
Status WriteWhileRefused(int error, int times, bool* all_there) {
  ScratchDir dir;
  const std::string data = Pattern(8 * 4096), old(data.size(), 'o');
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(DiskEnv().WriteFile(dir / "f", old, 0600));
  PosixEnv env;
  REQUIRE_OK(env.ReuseFile(dir / "f", dir / "g", 0600, false, &file));
  StringSink blocks(file.get(), data, 4096);
  const auto pool = UringPool(2);
  refusals.error = error;
  refusals.asked = 0;
  refusals.left = times;
  Status status = blocks.Write(pool.get());
  CHECK(refusals.left.exchange(0) == 0);
  CHECK(refusals.asked >= 8);
  std::string content;
  REQUIRE_OK(env.ReadFile(dir / "g", data.size(), &content));
  *all_there = content == data;
  // A ring that refused goes on.
  REQUIRE_OK(blocks.Write(pool.get()));
  REQUIRE_OK(env.ReadFile(dir / "g", data.size(), &content));
  CHECK((content == data));
  CHECK(pool->Close(30));
  return status;
}

}  // namespace

TEST_CASE("a ring that does not take a write now is asked again") {
  if (SkipWithoutUring()) return;
  for (const int error : {EAGAIN, EBUSY, EINTR}) {
    CAPTURE(error);
    bool all_there = false;
    REQUIRE_OK(WriteWhileRefused(error, 5, &all_there));
    CHECK(all_there);
    CHECK(refusals.asked == 5 + 8 + 8);
  }
}

TEST_CASE("mutation: a ring that is asked once only is caught") {
  if (SkipWithoutUring()) return;
  bool all_there = true;
  // An error that is not tried again, in the place of those that are.
  CHECK_ERRNO(WriteWhileRefused(EBADF, 5, &all_there), EBADF);
  CHECK(!all_there);
  CHECK(refusals.asked == 8 + 8);
}

}  // namespace layerwise

// The linker puts these in the place of io_uring_submit (--wrap in CMakeLists.txt), in this program only: no real
// kernel can be made to be short of memory at a given request.
extern "C" {
int __real_io_uring_submit(io_uring* ring);
int __wrap_io_uring_submit(io_uring* ring) {
  if (layerwise::LastIsWrite(ring)) {
    layerwise::refusals.asked += 1;
    if (layerwise::refusals.left > 0) {
      layerwise::refusals.left -= 1;
      return -layerwise::refusals.error;
    }
  }
  return __real_io_uring_submit(ring);
}
}
