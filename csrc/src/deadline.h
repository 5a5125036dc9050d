// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_DEADLINE_H_
#define LAYERWISE_SRC_DEADLINE_H_

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace layerwise {

// Nanoseconds of CLOCK_MONOTONIC.
inline int64_t MonotonicNs() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

using Deadline = std::chrono::steady_clock::time_point;

// Three years are as good as forever; a negative or undefined timeout is over now.
inline Deadline DeadlineAfter(double timeout_s) {
  const std::chrono::duration<double> timeout(timeout_s > 0 ? std::min(timeout_s, 1e8) : 0);
  return std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(timeout);
}

}  // namespace layerwise

#endif  // LAYERWISE_SRC_DEADLINE_H_
