// SPDX-License-Identifier: Apache-2.0
#include "layerwise/signal_ear.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "answers.h"

namespace layerwise {

namespace {

constexpr int kSignal = SIGUSR1;

std::atomic<int> plain_calls{0}, informed_calls{0}, last_sender{0};

void Plain(int) { plain_calls += 1; }

void Informed(int, siginfo_t* info, void*) {
  informed_calls += 1;
  last_sender = info->si_pid;
}

struct sigaction was_there;

// As a library does that chains: calls what was there before it.
void InFront(int number, siginfo_t* info, void* context) {
  plain_calls += 1;
  was_there.sa_sigaction(number, info, context);
}

struct sigaction Action(void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  return action;
}

struct sigaction Action(void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO;
  return action;
}

// Puts what handles the signal, and the deaths of children, back at the end.
class Handling {
 public:
  explicit Handling(const struct sigaction& action) {
    REQUIRE(sigaction(SIGCHLD, nullptr, &children_) == 0);
    REQUIRE(sigaction(kSignal, &action, &before_) == 0);
    plain_calls = informed_calls = last_sender = 0;
  }
  ~Handling() {
    CHECK(sigaction(kSignal, &before_, nullptr) == 0);
    CHECK(sigaction(SIGCHLD, &children_, nullptr) == 0);
  }

 private:
  struct sigaction before_, children_;
};

struct sigaction Now(int number = kSignal) {
  struct sigaction now;
  REQUIRE(sigaction(number, nullptr, &now) == 0);
  return now;
}

struct Bell {
  Bell() { REQUIRE(fd >= 0); }
  ~Bell() {
    StopHearing(fd);
    close(fd);
  }

  // How often it rang since this was asked last.
  int Rang() const {
    uint64_t count = 0;
    return read(fd, &count, sizeof(count)) == sizeof(count) ? static_cast<int>(count) : 0;
  }

  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
};

// How a child ends that has run `action`.
template <typename Action>
int EndOfChild(Action action) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    action();
    Leave(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return status;
}

}  // namespace

TEST_CASE("a signal rings every bell once, and then runs the handler that was there, whatever its kind") {
  for (const bool informed : {true, false}) {
    const Handling handling(informed ? Action(Informed) : Action(Plain));
    Bell first, second;
    REQUIRE(HearSignal(kSignal, first.fd).ok());
    REQUIRE(HearSignal(kSignal, second.fd).ok());
    REQUIRE(HearSignal(kSignal, first.fd).ok());  // is known
    errno = ENOENT;
    raise(kSignal);
    CHECK(errno == ENOENT);
    std::thread([] { raise(kSignal); }).join();  // on whichever thread it arrives
    CHECK(first.Rang() == 2);
    CHECK(second.Rang() == 2);
    CHECK(informed_calls == (informed ? 2 : 0));
    CHECK(plain_calls == (informed ? 0 : 2));
    if (informed) CHECK(last_sender == getpid());
    StopHearing(first.fd);
    raise(kSignal);
    CHECK(first.Rang() == 0);
    CHECK(second.Rang() == 1);
    StopHearing(second.fd);
    StopHearing(second.fd);
    if (informed) CHECK((Now().sa_sigaction == &Informed));
    if (!informed) CHECK((Now().sa_handler == &Plain));
  }
}

TEST_CASE("neither the default action nor a signal that is ignored comes between, and both come back") {
  for (const auto handler : {SIG_DFL, SIG_IGN}) {
    const Handling handling(Action(handler));
    {
      Bell bell;
      REQUIRE(HearSignal(kSignal, bell.fd).ok());
      raise(kSignal);  // by default it would end the process
      CHECK(bell.Rang() == 1);
    }
    CHECK((Now().sa_handler == handler));
  }
}

TEST_CASE("from the first signal on nobody is told of the deaths of children") {
  const Handling handling(Action(Plain));
  const struct sigaction telling = Action(Plain);
  REQUIRE(sigaction(SIGCHLD, &telling, nullptr) == 0);
  Bell bell;
  REQUIRE(HearSignal(kSignal, bell.fd).ok());
  CHECK((Now(SIGCHLD).sa_handler == &Plain));
  raise(kSignal);
  CHECK((Now(SIGCHLD).sa_handler == SIG_DFL));
}

TEST_CASE("one that was put in front and passes on is run once, and the bell rings once") {
  const Handling handling(Action(Informed));
  Bell bell;
  REQUIRE(HearSignal(kSignal, bell.fd).ok());
  const struct sigaction theirs = Action(InFront);
  REQUIRE(sigaction(kSignal, &theirs, &was_there) == 0);
  raise(kSignal);
  CHECK(bell.Rang() == 1);
  CHECK(plain_calls == 1);
  CHECK(informed_calls == 1);
  REQUIRE(HearSignal(kSignal, bell.fd).ok());  // in front again: theirs passes on to what is behind it now
  raise(kSignal);
  CHECK(bell.Rang() == 1);
  CHECK(plain_calls == 2);
  // What somebody put in front since stays, and what it passes on to passes on as well.
  REQUIRE(sigaction(kSignal, &theirs, &was_there) == 0);
  StopHearing(bell.fd);
  CHECK((Now().sa_sigaction == &InFront));
}

TEST_CASE("one signal is heard, by a number of bells, and what is refused changes nothing") {
  const Handling handling(Action(Plain));
  {
    Bell bell;
    StopHearing(bell.fd);  // nothing is heard
    const Answered refused("sigaction", EINVAL);
    CHECK(HearSignal(kSignal, bell.fd).error_number() == EINVAL);
  }
  {
    Bell bell;
    const Answered refused("sigaction", EINVAL, 1, 1);
    CHECK(HearSignal(kSignal, bell.fd).error_number() == EINVAL);
    CHECK((Now().sa_handler == &Plain));
  }
  {
    std::vector<Bell> bells(16);
    for (const Bell& bell : bells) REQUIRE(HearSignal(kSignal, bell.fd).ok());
    Bell more;
    const Status many = HearSignal(kSignal, more.fd);
    CHECK(many.code() == Status::Code::kFailedPrecondition);
    const Status other = HearSignal(SIGUSR2, bells[0].fd);
    CHECK(other.code() == Status::Code::kFailedPrecondition);
    raise(kSignal);
    for (const Bell& bell : bells) CHECK(bell.Rang() == 1);
    CHECK(more.Rang() == 0);
  }
  CHECK((Now().sa_handler == &Plain));
  Bell bell;
  REQUIRE(HearSignal(kSignal, bell.fd).ok());  // there is room again
}

TEST_CASE("a forked child does with the signal what it did before, and rings no bell") {
  Bell bell;
  {
    const Handling handling(Action(Informed));
    REQUIRE(HearSignal(kSignal, bell.fd).ok());
    CHECK(EndOfChild([] {
      raise(kSignal);
      if (informed_calls != 1) Leave(1);
    }) == 0);
    CHECK(bell.Rang() == 0);
    StopHearing(bell.fd);
  }
#if !defined(__SANITIZE_THREAD__)  // it delivers signals itself: one that is raised in a handler does not end the child
  const Handling handling(Action(SIG_DFL));
  REQUIRE(HearSignal(kSignal, bell.fd).ok());
  const int status = EndOfChild([] { raise(kSignal); });
  CHECK((WIFSIGNALED(status) && WTERMSIG(status) == kSignal));
  CHECK(bell.Rang() == 0);
#endif
}

TEST_CASE("a child outlives a signal unless its parent sent it, or is dead") {
  const Handling handling(Action(Informed));
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    if (!OutliveSignal(kSignal).ok() || !OutliveSignal(kSignal).ok()) Leave(1);
    errno = ENOENT;
    raise(kSignal);  // as anybody but its parent
    if (informed_calls != 0 || errno != ENOENT) Leave(2);
    if (write(ready[1], "r", 1) != 1) Leave(3);
    while (informed_calls == 0) pause();
    Leave(last_sender == getppid() ? 0 : 4);
  }
  char byte = 0;
  REQUIRE(read(ready[0], &byte, 1) == 1);
  int status = -1;
  // Until it is heard: the signal may come right before the child pauses.
  while (waitpid(child, &status, WNOHANG) == 0) {
    kill(child, kSignal);
    usleep(1000);
  }
  CHECK(status == 0);
  close(ready[0]);
  close(ready[1]);
  // By default the signal of a parent ends it, as before.
  const struct sigaction by_default = Action(SIG_DFL);
  REQUIRE(sigaction(kSignal, &by_default, nullptr) == 0);
  const int end = EndOfChild([] {
    if (!OutliveSignal(kSignal).ok()) Leave(1);
    siginfo_t from_parent = {};
    from_parent.si_code = SI_USER;
    from_parent.si_pid = getppid();
    Now().sa_sigaction(kSignal, &from_parent, nullptr);
  });
  CHECK((WIFSIGNALED(end) && WTERMSIG(end) == kSignal));
}

}  // namespace layerwise
