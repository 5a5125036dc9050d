// SPDX-License-Identifier: Apache-2.0
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "answers.h"
#include "shard_fixture.h"

// "Not now" is no failure: of io_uring_enter (EAGAIN, EBUSY, EINTR) the write is offered again, of a completion (EAGAIN)
// it is done by a call that may block. What was written in part is gone on with.

namespace layerwise {

namespace {

// What io_uring_submit does not take, as if the kernel had no room for the request.
struct Refusals {
  std::atomic<int> error{0};
  std::atomic<int> left{0};   // how many submissions of a write are still refused
  std::atomic<int> asked{0};  // how many submissions of a write there were
};
Refusals refusals;

io_uring_sqe* Last(io_uring* ring) { return &ring->sq.sqes[(ring->sq.sqe_tail - 1) & ring->sq.ring_mask]; }

bool LastIsWrite(io_uring* ring) {
  const uint8_t opcode = Last(ring)->opcode;
  return opcode == IORING_OP_WRITEV || opcode == IORING_OP_WRITE_FIXED;
}

// How writes complete that are not done, or not whole.
struct Completions {
  enum class Kind { kAgain, kError, kHalf, kNothing };
  std::atomic<Kind> kind{Kind::kAgain};
  std::atomic<int> left{0};  // how many writes still complete so
  int empty_bell = -1;       // an eventfd: a read of it that must not block is EAGAIN
  uint64_t read = 0;
};
Completions completions;

// In the place of a write of one run: what completes as is wanted.
void Replace(io_uring_sqe* write) {
  const auto owner = write->user_data;
  const auto* const run = reinterpret_cast<const iovec*>(write->addr);
  const int file = write->fd;
  const uint64_t offset = write->off;
  switch (completions.kind) {
    case Completions::Kind::kAgain:
      io_uring_prep_read(write, completions.empty_bell, &completions.read, sizeof(completions.read), 0);
      write->rw_flags = RWF_NOWAIT;  // else the kernel waits for the bell by itself
      break;
    case Completions::Kind::kError:
      io_uring_prep_read(write, -1, &completions.read, sizeof(completions.read), 0);
      break;
    case Completions::Kind::kHalf:
      io_uring_prep_write(write, file, run->iov_base, static_cast<unsigned>(run->iov_len / 2), offset);
      break;
    case Completions::Kind::kNothing:
      io_uring_prep_write(write, file, run->iov_base, 0, offset);
      break;
  }
  write->user_data = owner;
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

// A file with other bytes in it, and eight blocks to write over them.
class EightBlocks {
 public:
  EightBlocks() {
    REQUIRE_OK(DiskEnv().WriteFile(dir_ / "f", std::string(data_.size(), 'o'), 0600));
    REQUIRE_OK(env_.ReuseFile(dir_ / "f", dir_ / "g", 0600, false, &file_));
    blocks_.emplace(file_.get(), data_, 4096);
  }

  // The first error of all blocks.
  Status Write(WriterPool* pool) { return blocks_->Write(pool); }

  bool AreThere() {
    std::string content;
    REQUIRE_OK(env_.ReadFile(dir_ / "g", data_.size(), &content));
    return content == data_;
  }

 private:
  ScratchDir dir_;
  PosixEnv env_;
  const std::string data_ = Pattern(8 * 4096);
  std::unique_ptr<WritableFile> file_;
  std::optional<StringSink> blocks_;
};

// Writes eight blocks while the first submissions are refused, or complete otherwise than as writes, then once more.
// The first error, and whether all bytes got to the file the first time.
Status WriteEight(const std::function<void()>& begin, bool* all_there) {
  EightBlocks blocks;
  const auto pool = UringPool(2);
  refusals.asked = 0;
  begin();
  Status status = blocks.Write(pool.get());
  CHECK(refusals.left.exchange(0) == 0);
  CHECK(completions.left.exchange(0) == 0);
  CHECK(refusals.asked >= 8);
  *all_there = blocks.AreThere();
  // A ring that refused goes on.
  REQUIRE_OK(blocks.Write(pool.get()));
  CHECK(blocks.AreThere());
  CHECK(pool->Close(30));
  return status;
}

Status WriteWhileRefused(int error, int times, bool* all_there) {
  return WriteEight(
      [&] {
        refusals.error = error;
        refusals.left = times;
      },
      all_there);
}

Status WriteThatCompletes(Completions::Kind kind, int times, bool* all_there) {
  completions.empty_bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  REQUIRE(completions.empty_bell >= 0);
  Status status = WriteEight(
      [&] {
        completions.kind = kind;
        completions.left = times;
      },
      all_there);
  close(completions.empty_bell);
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

TEST_CASE("a write that completes with EAGAIN is done by a call that may block") {
  if (SkipWithoutUring()) return;
  bool all_there = false;
  REQUIRE_OK(WriteThatCompletes(Completions::Kind::kAgain, 5, &all_there));
  CHECK(all_there);
  CHECK(refusals.asked == 8 + 8);
}

TEST_CASE("mutation: a completion that is taken for a failure is caught") {
  if (SkipWithoutUring()) return;
  bool all_there = true;
  // An error that is one, in the place of EAGAIN.
  CHECK_ERRNO(WriteThatCompletes(Completions::Kind::kError, 5, &all_there), EBADF);
  CHECK(!all_there);
}

TEST_CASE("a write that was done in part is continued, and one that gets nowhere fails") {
  if (SkipWithoutUring()) return;
  bool all_there = false;
  REQUIRE_OK(WriteThatCompletes(Completions::Kind::kHalf, 5, &all_there));
  CHECK(all_there);
  CHECK(refusals.asked == 5 + 8 + 8);
  CHECK_ERRNO(WriteThatCompletes(Completions::Kind::kNothing, 1, &all_there), EIO);
  CHECK(!all_there);
}

TEST_CASE("a ring that is not to be had, or lacks an operation, is refused with the reason, and leaves no thread") {
  if (SkipWithoutUring()) return;
  const auto create = [] {
    std::unique_ptr<WriterPool> pool;
    const Status status = WriterPool::Create({.backend = WriterPool::Backend::kUring, .depth = 2}, &pool);
    CHECK((pool != nullptr) == status.ok());
    return status;
  };
  {
    const Answered refused("eventfd", EMFILE);
    const Status status = create();
    CHECK_ERRNO(status, EMFILE);
    CHECK(status.message().find("eventfd") != std::string::npos);
  }
  for (const int error : {ENOMEM, EPERM}) {
    const Answered refused("io_uring_queue_init", error, 2);
    const Status status = create();
    CHECK_ERRNO(status, error);
    CHECK(status.message().find("io_uring_queue_init") != std::string::npos);
    CHECK_ERRNO(WriterPool::ProbeUring(), error);
  }
  {
    const Answered old("io_uring_queue_init", EINVAL);  // a kernel that does not know the flags gets a plain ring
    REQUIRE_OK(create());
  }
  {
    const NoThreads none;
    CHECK_ERRNO(create(), EAGAIN);
  }
  {
    const Answered refused("io_uring_get_probe_ring", kNothing);
    CHECK_ERRNO(WriterPool::ProbeUring(), ENOSYS);
  }
  {
    const Answered old("io_uring_get_probe_ring", IORING_OP_POLL_ADD);
    const Status status = WriterPool::ProbeUring();
    CHECK_ERRNO(status, ENOSYS);
    CHECK(status.message().find("operation " + std::to_string(IORING_OP_POLL_ADD)) != std::string::npos);
  }
  REQUIRE_OK(create());
}

TEST_CASE("a ring whose queue is full of what the kernel did not take fails writes, and goes on when it is emptied") {
  if (SkipWithoutUring()) return;
  EightBlocks blocks;
  const auto pool = UringPool(2);
  for (const int error : {EBADF, EINTR}) {  // EINTR: as often as it is asked again
    {
      const Answered refused("io_uring_submit", error, 1 << 30);
      CHECK_ERRNO(blocks.Write(pool.get()), error);
      const Status full = blocks.Write(pool.get());
      CHECK_ERRNO(full, EBUSY);
      CHECK(full.message().find("io_uring_get_sqe") != std::string::npos);
    }
    REQUIRE_OK(blocks.Write(pool.get()));
  }
  CHECK(blocks.AreThere());
  CHECK(pool->Close(30));
}

TEST_CASE("a ring that can't wait for the kernel now tries again") {
  if (SkipWithoutUring()) return;
  EightBlocks blocks;
  for (const auto& [call, error] : {std::pair{"io_uring_submit", EBADF}, std::pair{"io_uring_wait_cqe", EINTR},
                                    std::pair{"io_uring_wait_cqe", EBUSY}}) {
    CAPTURE(call);
    const Answered answered(call, error, 3);
    const auto pool = UringPool(2);
    while (answered.times() < 3) std::this_thread::yield();  // what it does until there is something to do
    REQUIRE_OK(blocks.Write(pool.get()));
    CHECK(pool->Close(30));
  }
}

}  // namespace layerwise

// The linker puts these in the place of io_uring_submit (--wrap in CMakeLists.txt), in this program only: no real
// kernel can be made to be short of memory at a given request.
extern "C" {
int __real_io_uring_submit(io_uring* ring);
int __wrap_io_uring_submit(io_uring* ring) {
  if (const int error = layerwise::AnswerTo("io_uring_submit"); error != 0) return -error;
  if (layerwise::LastIsWrite(ring)) {
    layerwise::refusals.asked += 1;
    if (layerwise::refusals.left > 0) {
      layerwise::refusals.left -= 1;
      return -layerwise::refusals.error;
    }
    if (layerwise::completions.left > 0) {
      layerwise::completions.left -= 1;
      layerwise::Replace(layerwise::Last(ring));
    }
  }
  return __real_io_uring_submit(ring);
}
}
