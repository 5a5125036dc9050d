#include "layerwise/hash.h"

namespace layerwise {

uint64_t Xxh3Baseline(const void* data, size_t n);
uint64_t Xxh3RunsBaseline(const iovec* runs, size_t count);
#if defined(__x86_64__)
uint64_t Xxh3Avx2(const void* data, size_t n);
uint64_t Xxh3RunsAvx2(const iovec* runs, size_t count);
uint64_t Xxh3Avx512(const void* data, size_t n);
uint64_t Xxh3RunsAvx512(const iovec* runs, size_t count);
#endif

namespace {

std::vector<HashVariant> Detect() {
  std::vector<HashVariant> variants;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) variants.push_back({"avx512", Xxh3Avx512, Xxh3RunsAvx512});
  if (__builtin_cpu_supports("avx2")) variants.push_back({"avx2", Xxh3Avx2, Xxh3RunsAvx2});
  variants.push_back({"sse2", Xxh3Baseline, Xxh3RunsBaseline});
#else
  variants.push_back({"scalar", Xxh3Baseline, Xxh3RunsBaseline});
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

std::string_view HashName() { return HashVariants().front().name; }

}  // namespace layerwise
