// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTS_LIVING_CHILD_H_
#define LAYERWISE_TESTS_LIVING_CHILD_H_

#include <doctest/doctest.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "answers.h"

namespace layerwise {

// A forked child that has run `begin` when this is made, and lives on until End.
class LivingChild {
 public:
  // The child ends at once if `begin` says false.
  explicit LivingChild(const std::function<bool()>& begin) {
    REQUIRE(pipe(ready_) == 0);
    REQUIRE(pipe(done_) == 0);
    pid_ = fork();
    REQUIRE(pid_ >= 0);
    char byte = 0;
    if (pid_ == 0) {
      close(done_[1]);
      Leave(begin() && write(ready_[1], "r", 1) == 1 && read(done_[0], &byte, 1) >= 0 ? 0 : 1);
    }
    close(ready_[1]);  // so that a child that has ended is no wait without end
    REQUIRE(read(ready_[0], &byte, 1) == 1);
  }

  // REQUIRES: called once.
  void End() {
    close(done_[1]);
    int status = 0;
    REQUIRE(waitpid(pid_, &status, 0) == pid_);
    CHECK(status == 0);
    close(ready_[0]);
    close(done_[0]);
  }

 private:
  int ready_[2], done_[2];
  pid_t pid_ = -1;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_LIVING_CHILD_H_
