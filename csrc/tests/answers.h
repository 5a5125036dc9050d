// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTS_ANSWERS_H_
#define LAYERWISE_TESTS_ANSWERS_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

// What stands between the core and the C library, in this program only (--wrap in CMakeLists.txt, answers.cc): no real
// kernel, disk or allocator can be made to fail at a given call, nor another process to come between two calls.

namespace layerwise {

// In the place of an errno, for pwrite, pwritev and pread: half of the bytes, in whole sectors; none.
inline constexpr int kHalf = -1;
inline constexpr int kNothing = -2;

// While it lives, a call is answered otherwise than by the kernel, on whichever thread it is made. The call of a
// function that has commands goes by the command's name: "F_SETFL" and not "fcntl". A call that `close` refuses closes
// all the same, as it does on Linux. What tests call themselves is meant as well.
class Answered {
 public:
  // After the first `after` calls, `times` fail with `error`.
  Answered(const std::string& call, int error, int times = 1, int after = 0);
  // Right before the call that comes after the first `after`, this happens. The call itself goes to the kernel.
  Answered(const std::string& call, std::function<void()> meanwhile, int after = 0);
  // Fails the test case if no call was answered: then it has shown nothing.
  ~Answered();
  Answered(const Answered&) = delete;
  Answered& operator=(const Answered&) = delete;

  int times() const;  // that it was answered so

  struct Rule;

 private:
  const std::unique_ptr<Rule> rule_;
};

// For what stands between in another file: what the call is to say; 0 if the kernel is to be asked.
int AnswerTo(const char* call);

// While it lives, files are mapped on any file system as on one with DAX: without MAP_SYNC, which the kernel refuses
// elsewhere. All is as there but that nothing survives a power loss.
class AsOnDax {
 public:
  AsOnDax();
  ~AsOnDax();
};

// While it lives, the calling thread finds memory `left` times by the core's own calls of operator new, then
// std::bad_alloc once. (What the C++ library allocates inside itself is not counted.)
class ShortOfMemory {
 public:
  explicit ShortOfMemory(long left);
  ~ShortOfMemory();
  bool met() const;  // whether an allocation failed
};

// While it lives, no thread can be started: none has room for a stack.
class NoThreads {
 public:
  NoThreads();
  ~NoThreads();

 private:
  size_t before_ = 0;
};

// Ends a forked child at once, as _exit does, but what it ran is counted where coverage is (tests/coverage.sh).
[[noreturn]] void Leave(int status);

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_ANSWERS_H_
