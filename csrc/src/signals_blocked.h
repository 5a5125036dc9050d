// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_SIGNALS_BLOCKED_H_
#define LAYERWISE_SRC_SIGNALS_BLOCKED_H_

#include <pthread.h>
#include <signal.h>

namespace layerwise {

// While it lives, no signal comes to the calling thread, nor ever to threads that it starts: signals are for the
// threads that were there before. However the scope is left, the thread hears them again.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_SIGNALS_BLOCKED_H_
