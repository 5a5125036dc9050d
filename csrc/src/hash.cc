#include "layerwise/hash.h"

namespace layerwise {

uint64_t Xxh3Baseline(const void* data, size_t n);
#if defined(__x86_64__)
uint64_t Xxh3Avx2(const void* data, size_t n);
uint64_t Xxh3Avx512(const void* data, size_t n);
#endif

namespace {

std::vector<HashVariant> Detect() {
  std::vector<HashVariant> variants;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) variants.push_back({"avx512", Xxh3Avx512});
  if (__builtin_cpu_supports("avx2")) variants.push_back({"avx2", Xxh3Avx2});
  variants.push_back({"sse2", Xxh3Baseline});
#else
  variants.push_back({"scalar", Xxh3Baseline});
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

std::string_view HashName() { return HashVariants().front().name; }

}  // namespace layerwise
