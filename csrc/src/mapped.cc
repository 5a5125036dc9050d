// SPDX-License-Identifier: Apache-2.0
#include "layerwise/mapped.h"

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

namespace layerwise {

namespace {

// Where the other call is not allowed. It does not see that mapped memory can't be read.
bool InCore(uintptr_t at) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char there;
  return mincore(reinterpret_cast<void*>(at / page * page), 1, &there) == 0 || errno != ENOMEM;
}

bool Readable(uintptr_t first, uintptr_t last) {
  char bytes[2];
  const iovec to[] = {{bytes, sizeof(bytes)}};
  const iovec from[] = {{reinterpret_cast<void*>(first), 1}, {reinterpret_cast<void*>(last), 1}};
  const ssize_t got = process_vm_readv(getpid(), to, 1, from, 2, 0);
  if (got >= 0 || errno == EFAULT) return got == 2;
  return InCore(first) && InCore(last);
}

}  // namespace

Status CheckMapped(uintptr_t address, uint64_t n) {
  if (n == 0 || (address != 0 && address <= UINTPTR_MAX - n && Readable(address, address + (n - 1)))) {
    return Status::Ok();
  }
  char at[2 + 16 + 1];
  std::snprintf(at, sizeof(at), "0x%llx", static_cast<unsigned long long>(address));
  return Status::InvalidArgument(std::to_string(n) + " bytes at address " + at + ", where " +
                                 (address == 0 ? "there is no memory" : "not all of that is mapped memory"));
}

}  // namespace layerwise
