// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_CALLS_H_
#define LAYERWISE_CALLS_H_

#include <cstdint>
#include <list>
#include <optional>
#include <string>
#include <vector>

namespace layerwise {

// A call to the operating system that has not returned.
struct Call {
  const char* operation;  // a literal
  std::string path;
  int64_t began;  // nanoseconds of CLOCK_MONOTONIC

  double Seconds() const;  // since it began
};

// Nothing ends a call that a disk does not answer. What waits for one says by this
// which it is.
//
// Threads: every function may be called by several threads at once. A child made by
// fork begins with none.
class OngoingCall {
 public:
  OngoingCall(const char* operation, const std::string& path);
  ~OngoingCall();
  OngoingCall(const OngoingCall&) = delete;
  OngoingCall& operator=(const OngoingCall&) = delete;

 private:
  class Calls;
  friend std::vector<Call> CallsUnderWay();

  Calls* const calls_;
  const std::optional<std::list<Call>::iterator> place_;  // without memory nobody hears of the call
};

// The longest first.
std::vector<Call> CallsUnderWay();

}  // namespace layerwise

#endif  // LAYERWISE_CALLS_H_
