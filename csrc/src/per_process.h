// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_PER_PROCESS_H_
#define LAYERWISE_SRC_PER_PROCESS_H_

#include <unistd.h>

#include <atomic>

namespace layerwise {

// One T for each process: a forked child begins with a new one, since a thread that it
// lacks may hold a lock of its parent's. Never destroyed: threads may outlive the
// destruction of statics at exit.
//
// Threads: Get may be called by several threads at once.
template <typename T>
class PerProcess {
 public:
  T* Get() {
    Owned* known = own_.load(std::memory_order_acquire);
    while (known == nullptr || known->process != getpid()) {
      Owned* const made = new Owned;
      if (own_.compare_exchange_strong(known, made, std::memory_order_acq_rel)) return &made->value;
      delete made;
    }
    return &known->value;
  }

 private:
  struct Owned {
    const pid_t process = getpid();
    T value;
  };

  std::atomic<Owned*> own_{nullptr};
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_PER_PROCESS_H_
