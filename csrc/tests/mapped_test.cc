// SPDX-License-Identifier: Apache-2.0
#include "layerwise/mapped.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include "answers.h"

namespace layerwise {

TEST_CASE("memory that is not there, must not be read, or ends where there is none, is told from memory that is") {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const mapped = mmap(nullptr, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(mapped != MAP_FAILED);
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  // Not unmapped: something else may be mapped there at once.
  REQUIRE(mprotect(reinterpret_cast<void*>(begin + 3 * page), page, PROT_NONE) == 0);
  CHECK(CheckMapped(begin, 3 * page).ok());
  CHECK(CheckMapped(begin + 3 * page - 1, 1).ok());
  for (const auto& [address, n] : {std::pair<uintptr_t, uint64_t>{0, 1}, {1, 1}, {UINTPTR_MAX - 4, 100},
                                   {begin, UINT64_MAX}}) {
    CHECK(CheckMapped(address, n).code() == Status::Code::kInvalidArgument);
    CHECK(CheckMapped(address, 0).ok());
  }
  char byte;
  const iovec to{&byte, 1};
  const iovec from{mapped, 1};
  if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != 1) {
    MESSAGE("SKIP: process_vm_readv is not to be had here");
  } else {
    CHECK(!CheckMapped(begin, 3 * page + 1).ok());
    CHECK(!CheckMapped(begin + 3 * page, 1).ok());
    CHECK(!CheckMapped(begin + 3 * page, page).ok());
  }
  // Where that call is not allowed (containers, seccomp), what is mapped at all is told from what is not.
  void* const gone = mmap(nullptr, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(gone != MAP_FAILED);
  {
    const Answered forbidden("process_vm_readv", EPERM, 3);
    CHECK(CheckMapped(begin, 4 * page).ok());
    munmap(gone, page);
    CHECK(!CheckMapped(reinterpret_cast<uintptr_t>(gone), 1).ok());
    const Answered unknown("mincore", EAGAIN);  // no answer: it is not said to be missing
    CHECK(CheckMapped(begin, page).ok());
  }
  munmap(mapped, 4 * page);
}

}  // namespace layerwise
