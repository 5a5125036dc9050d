// SPDX-License-Identifier: Apache-2.0
#include "layerwise/huge_pages.h"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <vector>

#include "answers.h"

namespace layerwise {

namespace {

char* Map(size_t n) {
  void* const at = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(at != MAP_FAILED);
  return static_cast<char*>(at);
}

}  // namespace

TEST_CASE("huge pages keep what the memory holds") {
  const size_t n = 4 * kHugePage;
  char* const memory = Map(n);
  for (size_t i = 0; i < n; ++i) memory[i] = static_cast<char>(i * 2654435761u >> 24);
  const std::vector<char> before(memory, memory + n);
  size_t huge = 0;
  const Status status = MakeHuge(reinterpret_cast<uintptr_t>(memory) + 1, n - 1, &huge);
  if (!status.ok()) {
    CHECK(status.error_number() == EINVAL);
    MESSAGE("SKIP: this kernel does not collapse into huge pages");
  } else {
    CHECK(huge % kHugePage == 0);
    CHECK(huge <= n);
  }
  CHECK(std::equal(before.begin(), before.end(), memory));
  munmap(memory, n);
}

TEST_CASE("memory that is not mapped, or holds no whole huge page, is left alone") {
  char* const memory = Map(2 * kHugePage);
  size_t huge = 1;
  CHECK(MakeHuge(reinterpret_cast<uintptr_t>(memory), 4096, &huge).ok());
  CHECK(huge == 0);
  munmap(memory, 2 * kHugePage);
  static_cast<void>(MakeHuge(reinterpret_cast<uintptr_t>(memory), 2 * kHugePage, &huge));
  CHECK(huge == 0);
}

TEST_CASE("a kernel that does not know how to collapse says so at once, and one without room for a page goes on") {
  char* const memory = Map(4 * kHugePage);
  const auto address = reinterpret_cast<uintptr_t>(memory);
  size_t huge = 1;
  {
    const Answered unknown("MADV_COLLAPSE", EINVAL);
    const Status status = MakeHuge(address, 4 * kHugePage, &huge);
    CHECK(status.error_number() == EINVAL);
    CHECK(status.message().find("collapse into huge pages") != std::string::npos);
    CHECK(huge == 0);
  }
  {
    const Answered full("MADV_COLLAPSE", ENOMEM, 4);
    CHECK(MakeHuge(address, 4 * kHugePage, &huge).ok());
    CHECK(huge == 0);
    CHECK(full.times() >= 3);
  }
  munmap(memory, 4 * kHugePage);
}

}  // namespace layerwise
