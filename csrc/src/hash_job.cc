// SPDX-License-Identifier: Apache-2.0
#include "layerwise/hash_job.h"

#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "layerwise/hash.h"
#include "per_process.h"
#include "signals_blocked.h"

namespace layerwise {

struct HashJob::Work {
  explicit Work(std::vector<Piece> given) : pieces(std::move(given)), hashes(pieces.size()) {}

  // Hashes pieces until none is left that nobody has taken.
  void Help() {
    std::unique_lock lock(mutex);
    while (!ended && taken < pieces.size()) {
      const size_t mine = taken++;
      lock.unlock();
      hashes[mine] = Xxh3(pieces[mine].data, pieces[mine].n);
      lock.lock();
      done += 1;
    }
    if (done == taken) rested.notify_all();
  }

  // No piece is taken any more. Returns when none is being hashed.
  void End() {
    std::unique_lock lock(mutex);
    ended = true;
    rested.wait(lock, [this] { return done == taken; });
  }

  const std::vector<Piece> pieces;
  std::vector<uint64_t> hashes;  // of those that are done
  std::mutex mutex;
  std::condition_variable rested;
  size_t taken = 0;  // guarded by mutex, as the rest
  size_t done = 0;
  bool ended = false;
};

namespace {

class Helper {
 public:
  void Give(std::shared_ptr<HashJob::Work> work) {
    std::lock_guard lock(mutex_);
    if (!started_) started_ = Start();
    if (!started_) return;  // who waits does all of it
    queue_.push_back(std::move(work));
    came_.notify_one();
  }

 private:
  bool Start() {
    const SignalsBlocked blocked;
    try {
      std::thread([this] { Run(); }).detach();  // it ends with the process, as does this
    } catch (const std::system_error&) {
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  void Run() {
    pthread_setname_np(pthread_self(), "layerwise-hash");
    std::unique_lock lock(mutex_);
    for (;;) {
      came_.wait(lock, [this] { return !queue_.empty(); });
      const std::shared_ptr<HashJob::Work> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work->Help();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable came_;
  std::deque<std::shared_ptr<HashJob::Work>> queue_;  // guarded by mutex_, as the rest
  bool started_ = false;
};

PerProcess<Helper> helper;

}  // namespace

HashJob::HashJob(std::vector<Piece> pieces)
    : work_(std::make_shared<Work>(std::move(pieces))), process_(getpid()) {
  if (!work_->pieces.empty()) helper.Get()->Give(work_);
}

HashJob::~HashJob() {
  if (getpid() == process_) work_->End();
}

const std::vector<uint64_t>& HashJob::Hashes() {
  work_->Help();
  work_->End();
  return work_->hashes;
}

}  // namespace layerwise
