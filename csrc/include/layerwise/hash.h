// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_HASH_H_
#define LAYERWISE_HASH_H_

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace layerwise {

// XXH3-64 with seed 0 of n bytes: the hash of the shard format. Uses the widest
// instruction set of the processor that it runs on; the value does not depend on
// it. Callable from any thread.
uint64_t Xxh3(const void* data, size_t n);

// The same of the pieces' bytes, taken as one string.
uint64_t Xxh3Runs(const iovec* runs, size_t count);

// The same, piece by piece. Not thread-safe; another thread may go on with it.
class Xxh3Stream {
 public:
  Xxh3Stream() { Reset(); }
  void Reset();
  void Update(const void* data, size_t n);
  // Of all that came since the last Reset.
  uint64_t Digest() const;

  static constexpr size_t kStateBytes = 640;

 private:
  alignas(64) char state_[kStateBytes];
};

// Which instruction set Xxh3 uses: "avx512", "avx2", "sse2" or "scalar".
std::string_view HashName();

struct HashVariant {
  std::string_view name;
  uint64_t (*hash)(const void* data, size_t n);
  uint64_t (*runs)(const iovec* runs, size_t count);
  void (*reset)(void* state);
  void (*update)(void* state, const void* data, size_t n);
  uint64_t (*digest)(const void* state);
};

// Every variant that this processor can run, the widest first.
const std::vector<HashVariant>& HashVariants();

}  // namespace layerwise

#endif  // LAYERWISE_HASH_H_
