// SPDX-License-Identifier: Apache-2.0
#include "layerwise/signal_ear.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <string>

#include "per_process.h"

namespace layerwise {

namespace {

constexpr int kBells = 16;

// A handler that was there is kept for good once it was seen here: a thread may be about to pass on to it.
struct Kept {
  struct sigaction action;
  const Kept* earlier;
};

// What a handler reads.
struct Front {
  std::atomic<const Kept*> before{nullptr};
  std::atomic<pid_t> process{0};
  std::atomic<pid_t> inside{0};  // the thread that is in the handler
};

Front ear, worker;
std::atomic<int> bells[kBells];  // one more than the descriptor; 0: none
int heard = 0;                   // the signal, guarded by the mutex

std::mutex& Mutex() {
  static PerProcess<std::mutex> own;
  return *own.Get();
}

// `by_default`: the default action too, once the handler has returned.
void PassOn(const struct sigaction& before, int number, siginfo_t* info, void* context, bool by_default) {
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler == SIG_DFL) {
    if (by_default) {
      signal(number, SIG_DFL);
      raise(number);
    }
  } else if (before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  }
}

void Ring() {
  const uint64_t one = 1;
  for (const std::atomic<int>& bell : bells) {
    // It can't fail: the counter is far from its limit.
    if (bell != 0) static_cast<void>(!write(bell - 1, &one, sizeof(one)));
  }
}

// A forked child that still has this handler is not meant: it does as it did before.
void Hear(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const pid_t thread = gettid();
  // One that was installed in front of this one passes on to it, and is now behind it.
  if (ear.inside == thread) return;
  const pid_t outer = ear.inside.exchange(thread);
  const bool ours = ear.process == getpid();
  if (ours) {
    ForgetDeadChildren();
    Ring();
  }
  PassOn(ear.before.load()->action, number, info, context, !ours);
  ear.inside = outer;
  errno = error;
}

void Outlive(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const pid_t parent = worker.process;
  if (getppid() == parent && !(info->si_code == SI_USER && info->si_pid == parent)) {
    // Whoever is inside a function of the script hears of nothing: then the kernel sees to it.
    static_cast<void>(prctl(PR_SET_PDEATHSIG, SIGKILL));
  } else {
    PassOn(worker.before.load()->action, number, info, context, true);
  }
  errno = error;
}

using Handler = void (*)(int, siginfo_t*, void*);

// Puts `handler` in front of what is there, unless it is in front.
Status PutInFront(Front* front, int number, Handler handler) {
  struct sigaction now;
  if (sigaction(number, nullptr, &now) != 0) return Status::IoError(errno, "sigaction", "");
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == handler) return Status::Ok();
  front->before = new Kept{now, front->before};
  struct sigaction ours = now;  // its mask too, and whether calls into the kernel are gone on with
  const bool handled = (now.sa_flags & SA_SIGINFO) != 0 || (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN);
  ours.sa_flags = SA_SIGINFO | (handled ? now.sa_flags & (SA_RESTART | SA_ONSTACK) : SA_RESTART | SA_ONSTACK);
  ours.sa_sigaction = handler;
  if (sigaction(number, &ours, nullptr) != 0) return Status::IoError(errno, "sigaction", "");
  return Status::Ok();
}

std::atomic<int>* PlaceOf(int bell) {
  std::atomic<int>* found = nullptr;
  for (std::atomic<int>& place : bells) {
    if (place == bell + 1) return &place;
    if (place == 0 && found == nullptr) found = &place;
  }
  return found;
}

}  // namespace

Status HearSignal(int number, int bell) {
  std::lock_guard lock(Mutex());
  std::atomic<int>* const place = PlaceOf(bell);
  if (place == nullptr || (heard != 0 && heard != number)) {
    return Status::FailedPrecondition("one signal is heard, by at most " + std::to_string(kBells) + " bells");
  }
  heard = number;
  ear.process = getpid();
  const Status status = PutInFront(&ear, number, Hear);
  if (status.ok()) *place = bell + 1;
  return status;
}

void StopHearing(int bell) {
  std::lock_guard lock(Mutex());
  std::atomic<int>* const place = PlaceOf(bell);
  if (place != nullptr) *place = 0;
  for (const std::atomic<int>& other : bells) {
    if (other != 0) return;
  }
  if (heard == 0) return;
  ear.process = 0;
  struct sigaction now;
  // One that was put in front since stays: it may pass on to this one, which passes on as well.
  if (sigaction(heard, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == Hear) {
    sigaction(heard, &ear.before.load()->action, nullptr);
  }
  heard = 0;
}

void ForgetDeadChildren() {
  struct sigaction nobody = {};
  nobody.sa_handler = SIG_DFL;
  sigaction(SIGCHLD, &nobody, nullptr);
}

Status OutliveSignal(int number) {
  worker.process = getppid();
  return PutInFront(&worker, number, Outlive);
}

}  // namespace layerwise
