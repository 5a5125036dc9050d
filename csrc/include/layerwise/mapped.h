// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_MAPPED_H_
#define LAYERWISE_MAPPED_H_

#include <cstdint>

#include "layerwise/status.h"

namespace layerwise {

// InvalidArgument unless `n` bytes at `address` begin and end in memory that this process
// can read; what lies between is taken for readable. OK for no bytes, wherever they are.
//
// For addresses that come from outside: it costs one system call, and touching what is not
// mapped would end the process.
Status CheckMapped(uintptr_t address, uint64_t n);

}  // namespace layerwise

#endif  // LAYERWISE_MAPPED_H_
