#include "layerwise/mapped.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

namespace layerwise {

TEST_CASE("memory that is not there, or ends where there is none, is told from memory that is") {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const mapped = mmap(nullptr, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(mapped != MAP_FAILED);
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  REQUIRE(munmap(reinterpret_cast<void*>(begin + 3 * page), page) == 0);
  CHECK(CheckMapped(begin, 3 * page).ok());
  CHECK(CheckMapped(begin + 3 * page - 1, 1).ok());
  for (const auto& [address, n] : {std::pair<uintptr_t, uint64_t>{0, 1},
                                   {1, 1},
                                   {begin, 3 * page + 1},
                                   {begin + 3 * page, 1},
                                   {UINTPTR_MAX - 4, 100},
                                   {begin, UINT64_MAX}}) {
    CAPTURE(address);
    CAPTURE(n);
    CHECK(CheckMapped(address, n).code() == Status::Code::kInvalidArgument);
    CHECK(CheckMapped(address, 0).ok());
  }
  munmap(mapped, 3 * page);
}

TEST_CASE("memory that must not be read counts as not there") {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const closed = mmap(nullptr, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(closed != MAP_FAILED);
  CHECK(!CheckMapped(reinterpret_cast<uintptr_t>(closed), page).ok());
  munmap(closed, page);
}

}  // namespace layerwise
