// SPDX-License-Identifier: Apache-2.0
#include "uring_core.h"

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <optional>
#include <string>
#include <utility>

#include "descriptor.h"
#include "guarded.h"
#include "layerwise/calls.h"
#include "layerwise/hash.h"
#include "pieces.h"

namespace layerwise {

namespace {

// How often, a millisecond apart, a ring without memory for a request is asked again.
constexpr int kSubmitTries = 1000;

Status UringError(int error_number, const char* operation, const std::string& path) {
  return Status::IoError(error_number, operation, path);
}

// One thread issues, and looks at completions when it enters the kernel anyway; a
// kernel that does not know these flags gets a plain ring.
int SetUp(unsigned entries, io_uring* ring) {
  const unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
  const int result = io_uring_queue_init(entries, ring, flags);
  return result == -EINVAL ? io_uring_queue_init(entries, ring, 0) : result;
}

// As much of a block as is hashed before completions are looked at again: a write that
// ends is followed at once, and the disk does not wait for the hash of another block.
constexpr size_t kHashSlice = 128 << 10;

void Pause() {
  const timespec millisecond{0, 1000000};
  nanosleep(&millisecond, nullptr);
}

class UringCore final : public PoolCore {
 public:
  UringCore(int depth, Bounce bounce) : bounce_(bounce), slots_(static_cast<size_t>(depth)) {
    auto scratch = CutBounce(bounce, depth);
    for (size_t i = 0; i < slots_.size(); ++i) {
      slots_[i].scratch = std::move(scratch[i]);
      free_.push_back(&slots_[i]);
    }
    unhashed_.reserve(slots_.size());
  }

  // Where Start failed before there was a thread to do so.
  ~UringCore() override { CloseEvent(); }

  Status Start() override {
    event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (event_ < 0) return UringError(errno, "eventfd", "");
    // Only the thread that makes a ring may use it.
    std::promise<Status> made;
    std::future<Status> result = made.get_future();
    Status status = StartThreads(1, [this, &made](int) {
      const int error = SetUp(static_cast<unsigned>(slots_.size()) + 1, &ring_);
      made.set_value(error == 0 ? Status::Ok() : UringError(-error, "io_uring_queue_init", ""));
      if (error != 0) return;
      // A child that held the ring would hold the files of the writes in it, and its memory.
      KeepFromChildren(ring_.ring_fd);
      static_cast<void>(io_uring_ring_dontfork(&ring_));
      Register();
      Work();
      LeaveToChildren(ring_.ring_fd);
      io_uring_queue_exit(&ring_);
      // From here on nobody is asleep, so Wake does not touch it.
      CloseEvent();
    });
    return status.ok() ? result.get() : status;
  }

 private:
  struct Slot {
    AlignedBuffer scratch;
    Job job{};
    BlockWrite write;
    Pieces left;
    uint64_t offset = 0;  // where `left` goes
    bool writing = false;
    std::optional<OngoingCall> call;  // from the first try on, until nothing is with the kernel
    Status status;
    Xxh3Stream hash;
    size_t run = 0;     // of write.runs: what is hashed ends in this one
    size_t hashed = 0;  // bytes of it
  };

  void CloseEvent() {
    const int event = std::exchange(event_, -1);
    if (event >= 0) close(event);
  }

  // Saves the kernel the pinning of pages for each write. Not to have it is no error.
  void Register() {
    if (bounce_.empty()) return;
    const iovec memory{bounce_.data(), bounce_.size()};
    registered_ = io_uring_register_buffers(&ring_, &memory, 1) == 0;
  }

  bool InRegistered(const iovec& run) const {
    const char* const begin = static_cast<const char*>(run.iov_base);
    return registered_ && begin >= bounce_.data() && begin + run.iov_len <= bounce_.data() + bounce_.size();
  }

  void Wake(size_t) override {
    if (!asleep_) return;
    asleep_ = false;
    const uint64_t one = 1;
    // It can't fail: the counter is far from its limit.
    static_cast<void>(!write(event_, &one, sizeof(one)));
  }

  void Work() {
    for (;;) {
      while (StartNext()) continue;
      Reap();
      if (!unhashed_.empty()) {
        HashSome();
        continue;
      }
      std::unique_lock lock(mutex_);
      if (empty() && closed() && free_.size() == slots_.size()) return;
      if (!empty() && !free_.empty()) continue;
      asleep_ = empty() && !closed();
      lock.unlock();
      WaitForEvent();
      lock.lock();
      asleep_ = false;
    }
  }

  // Starts the first block of the queue; false if there is none, or no room.
  bool StartNext() {
    if (free_.empty()) return false;
    Slot* const slot = free_.back();
    {
      std::lock_guard lock(mutex_);
      if (empty()) return false;
      slot->job = Pop();
    }
    slot->write.runs.clear();
    slot->write.hashed = false;
    bool started = true;
    slot->status = Guarded([&] {
      started = slot->job.sink->StartBlock(slot->job.index, &slot->scratch, &slot->write);
      if (started) slot->left.Assign(slot->write.runs.data(), slot->write.runs.size());
      return Status::Ok();
    });
    if (!started) return true;
    free_.pop_back();
    if (!slot->status.ok()) {
      FinishIfDone(slot);
      return true;
    }
    slot->offset = slot->write.offset;
    slot->call.emplace("write", *slot->write.path);
    if (slot->write.file->descriptor() < 0) {
      Write(slot);
    } else {
      SubmitWrite(slot);
    }
    if (!slot->write.hashed) {
      slot->hash.Reset();
      slot->run = slot->hashed = 0;
      unhashed_.push_back(slot);
    } else {
      FinishIfDone(slot);
    }
    return true;
  }

  // By the file's own call, which blocks.
  void Write(Slot* slot) {
    slot->status =
        Guarded([&] { return slot->write.file->Pwritev(slot->left.data(), slot->left.count(), slot->offset); });
  }

  // Null if the queue is full and the kernel takes nothing. Requests that it would not take stay in the queue as no-ops;
  // without handing these over, a ring that refused a few times would stay full for good.
  io_uring_sqe* NextRequest() {
    io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
    return sqe != nullptr || Submit() != 0 ? sqe : io_uring_get_sqe(&ring_);
  }

  void SubmitWrite(Slot* slot) {
    io_uring_sqe* const sqe = NextRequest();
    if (sqe == nullptr) return Fail(slot, EBUSY, "io_uring_get_sqe");
    const int fd = slot->write.file->descriptor();
    const iovec* const runs = slot->left.data();
    if (slot->left.count() == 1 && InRegistered(runs[0])) {
      io_uring_prep_write_fixed(sqe, fd, runs[0].iov_base, static_cast<unsigned>(runs[0].iov_len), slot->offset, 0);
    } else {
      io_uring_prep_writev(sqe, fd, runs, static_cast<unsigned>(slot->left.count()), slot->offset);
    }
    io_uring_sqe_set_data(sqe, slot);
    slot->writing = true;
    const int error = Submit();
    if (error == 0) return;
    // The kernel has not seen it and may yet be offered it again.
    io_uring_prep_nop(sqe);
    io_uring_sqe_set_data(sqe, nullptr);
    slot->writing = false;
    Fail(slot, error, "io_uring_enter");
  }

  static void Fail(Slot* slot, int error_number, const char* operation) {
    slot->status = Guarded([&] { return UringError(error_number, operation, *slot->write.path); });
  }

  // 0, or an errno if the last request was not taken.
  int Submit() {
    int result = 0;
    for (int tries = 0; tries < kSubmitTries; ++tries) {
      result = io_uring_submit(&ring_);
      if (result >= 0) return 0;
      if (result == -EINTR) continue;
      if (result != -EAGAIN && result != -EBUSY) break;
      Pause();
    }
    return -result;
  }

  // Takes what has completed, without waiting.
  void Reap() {
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      void* const data = io_uring_cqe_get_data(cqe);
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
      if (data == this) {
        Rung();
      } else if (data != nullptr) {
        Written(static_cast<Slot*>(data), result);
      }
    }
  }

  void Written(Slot* slot, int result) {
    slot->writing = false;
    if (result > 0 || result == -EINTR) {
      const size_t done = result > 0 ? static_cast<size_t>(result) : 0;
      slot->left.Drop(done);
      slot->offset += done;
      if (!slot->left.empty()) SubmitWrite(slot);
    } else if (result == -EAGAIN) {
      Write(slot);  // not to be had without blocking
    } else if (result == 0) {
      Fail(slot, EIO, "io_uring write made no progress");
    } else {
      Fail(slot, -result, "io_uring write");
    }
    if (slot->write.hashed) FinishIfDone(slot);
  }

  // Goes on with the oldest block; a failed one needs no hash.
  void HashSome() {
    Slot* const slot = unhashed_.front();
    const std::vector<iovec>& runs = slot->write.runs;
    for (size_t room = kHashSlice; room > 0 && slot->run < runs.size() && slot->status.ok();) {
      const iovec& run = runs[slot->run];
      const size_t take = std::min(room, run.iov_len - slot->hashed);
      slot->hash.Update(static_cast<const char*>(run.iov_base) + slot->hashed, take);
      room -= take;
      slot->hashed += take;
      if (slot->hashed < run.iov_len) break;
      slot->run += 1;
      slot->hashed = 0;
    }
    if (slot->run < runs.size() && slot->status.ok()) return;
    unhashed_.erase(unhashed_.begin());
    slot->write.hash = slot->hash.Digest();
    slot->write.hashed = true;
    FinishIfDone(slot);
  }

  // REQUIRES: the slot is hashed.
  void FinishIfDone(Slot* slot) {
    if (slot->writing) return;
    slot->call.reset();
    slot->job.sink->FinishBlock(slot->job.index, slot->write, std::move(slot->status));
    free_.push_back(slot);
  }

  // Until a write completes or, if it sleeps, until Wake.
  void WaitForEvent() {
    if (!listening_) {
      io_uring_sqe* const sqe = NextRequest();
      if (sqe == nullptr) return Pause();
      io_uring_prep_poll_add(sqe, event_, POLLIN);
      io_uring_sqe_set_data(sqe, this);
      listening_ = Submit() == 0;
      if (!listening_) {
        io_uring_prep_nop(sqe);
        io_uring_sqe_set_data(sqe, nullptr);
        return Pause();
      }
    }
    io_uring_cqe* cqe = nullptr;
    const int result = io_uring_wait_cqe(&ring_, &cqe);
    if (result != 0 && result != -EINTR) Pause();
  }

  void Rung() {
    listening_ = false;
    uint64_t count;
    static_cast<void>(!read(event_, &count, sizeof(count)));
  }

  int event_ = -1;
  bool asleep_ = false;  // guarded by mutex_
  const Bounce bounce_;
  // The rest is the thread's own.
  io_uring ring_{};
  bool registered_ = false;
  bool listening_ = false;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
  std::vector<Slot*> unhashed_;  // in the order of their start; has room for all
};

}  // namespace

Status ProbeUring() {
  io_uring ring;
  const int error = SetUp(2, &ring);
  if (error != 0) return UringError(-error, "io_uring_queue_init", "");
  io_uring_probe* const probe = io_uring_get_probe_ring(&ring);
  Status status;
  if (probe == nullptr) {
    status = UringError(ENOSYS, "io_uring_register: probe", "");
  } else {
    for (int op : {IORING_OP_NOP, IORING_OP_WRITEV, IORING_OP_WRITE_FIXED, IORING_OP_POLL_ADD}) {
      if (!io_uring_opcode_supported(probe, op)) {
        status = UringError(ENOSYS, ("io_uring operation " + std::to_string(op)).c_str(), "");
        break;
      }
    }
    io_uring_free_probe(probe);
  }
  io_uring_queue_exit(&ring);
  return status;
}

std::unique_ptr<PoolCore> MakeUringCore(int depth, Bounce bounce) {
  return std::make_unique<UringCore>(depth, bounce);
}

}  // namespace layerwise
