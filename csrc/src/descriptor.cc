// SPDX-License-Identifier: Apache-2.0
#include "descriptor.h"

#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "posix_file.h"

namespace layerwise {

namespace {

// Descriptors that forked children close. Never destroyed, since forks may come during exit.
struct Ours {
  std::mutex mutex;  // held while the process forks
  std::unordered_set<int> open;
};

Ours& Own() {
  static Ours* const ours = [] {
    static Ours* const made = new Ours;
    static_cast<void>(pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                                     [] {
                                       for (const int fd : made->open) close(fd);
                                       made->open.clear();
                                       made->mutex.unlock();
                                     }));
    return made;
  }();
  return *ours;
}

}  // namespace

void KeepFromChildren(int fd) {
  std::lock_guard lock(Own().mutex);
  Own().open.insert(fd);
}

void LeaveToChildren(int fd) {
  std::lock_guard lock(Own().mutex);
  Own().open.erase(fd);
}

Descriptor::Descriptor(int fd) : fd_(fd), process_(getpid()) {
  if (fd >= 0) KeepFromChildren(fd);
}

Descriptor::Descriptor(Descriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), process_(other.process_) {}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    static_cast<void>(Close(""));
    fd_ = std::exchange(other.fd_, -1);
    process_ = other.process_;
  }
  return *this;
}

bool Descriptor::valid() const { return fd_ >= 0 && process_ == getpid(); }

Status Descriptor::Close(const std::string& path) {
  if (!valid()) {
    fd_ = -1;
    return Status::Ok();
  }
  const int fd = std::exchange(fd_, -1);
  // Both under the lock: the number may be another file's as soon as it is closed.
  std::lock_guard lock(Own().mutex);
  Own().open.erase(fd);
  // Linux frees the descriptor even when close is interrupted.
  return close(fd) != 0 && errno != EINTR ? PosixError("close", path) : Status::Ok();
}

}  // namespace layerwise
