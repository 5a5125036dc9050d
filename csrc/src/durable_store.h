// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_DURABLE_STORE_H_
#define LAYERWISE_SRC_DURABLE_STORE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace layerwise {

constexpr size_t kCacheLine = 64;

// Stores n bytes into persistent memory, and leaves none of them in a cache: what it
// has stored when it returns survives power loss. Bytes beside the range are not
// touched.
//
// `cpu` stores: Copy(out, in, n) through the caches; Flush(at) begins to write back
// the line that holds `at`; Stream(out, in) stores a whole line past the caches;
// Fence() waits for what was flushed and streamed before it. Tests give one that loses
// what was not fenced.
template <typename Cpu>
void StoreDurably(Cpu&& cpu, char* out, const char* in, size_t n) {
  const auto copy_within_a_line = [&cpu](char* to, const char* from, size_t length) {
    cpu.Copy(to, from, length);
    cpu.Flush(to);
  };
  const size_t head = std::min(n, (kCacheLine - reinterpret_cast<uintptr_t>(out) % kCacheLine) % kCacheLine);
  if (head > 0) copy_within_a_line(out, in, head);
  for (out += head, in += head, n -= head; n >= kCacheLine; out += kCacheLine, in += kCacheLine, n -= kCacheLine) {
    cpu.Stream(out, in);
  }
  if (n > 0) copy_within_a_line(out, in, n);
  cpu.Fence();
}

}  // namespace layerwise

#endif  // LAYERWISE_SRC_DURABLE_STORE_H_
