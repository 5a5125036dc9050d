// SPDX-License-Identifier: Apache-2.0
#include "layerwise/hash.h"

namespace layerwise {

#define LAYERWISE_DECLARE_HASH(name)                          \
  uint64_t Xxh3##name(const void* data, size_t n);            \
  uint64_t Xxh3Runs##name(const iovec* runs, size_t count);   \
  void Xxh3Reset##name(void* state);                          \
  void Xxh3Update##name(void* state, const void* data, size_t n); \
  uint64_t Xxh3Digest##name(const void* state)
#define LAYERWISE_HASH(text, name) \
  {text, Xxh3##name, Xxh3Runs##name, Xxh3Reset##name, Xxh3Update##name, Xxh3Digest##name}

LAYERWISE_DECLARE_HASH(Baseline);
#if defined(__x86_64__)
LAYERWISE_DECLARE_HASH(Avx2);
LAYERWISE_DECLARE_HASH(Avx512);
#endif

namespace {

std::vector<HashVariant> Detect() {
  std::vector<HashVariant> variants;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) variants.push_back(LAYERWISE_HASH("avx512", Avx512));
  if (__builtin_cpu_supports("avx2")) variants.push_back(LAYERWISE_HASH("avx2", Avx2));
  variants.push_back(LAYERWISE_HASH("sse2", Baseline));
#else
  variants.push_back(LAYERWISE_HASH("scalar", Baseline));
#endif
  return variants;
}

}  // namespace

const std::vector<HashVariant>& HashVariants() {
  static const auto* const variants = new std::vector<HashVariant>(Detect());
  return *variants;
}

uint64_t Xxh3(const void* data, size_t n) {
  static const auto hash = HashVariants().front().hash;
  return hash(data, n);
}

uint64_t Xxh3Runs(const iovec* runs, size_t count) {
  static const auto hash = HashVariants().front().runs;
  return hash(runs, count);
}

void Xxh3Stream::Reset() {
  static const auto reset = HashVariants().front().reset;
  reset(state_);
}

void Xxh3Stream::Update(const void* data, size_t n) {
  static const auto update = HashVariants().front().update;
  update(state_, data, n);
}

uint64_t Xxh3Stream::Digest() const {
  static const auto digest = HashVariants().front().digest;
  return digest(state_);
}

std::string_view HashName() { return HashVariants().front().name; }

}  // namespace layerwise
