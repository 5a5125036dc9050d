// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_GUARDED_H_
#define LAYERWISE_SRC_GUARDED_H_

#include <new>

#include "layerwise/status.h"

namespace layerwise {

// What `action` returns, or Status::NoMemory() if it finds no memory. An exception that
// leaves a thread of our own would end the process.
template <typename Action>
Status Guarded(Action action) {
  try {
    return action();
  } catch (const std::bad_alloc&) {
    return Status::NoMemory();
  }
}

}  // namespace layerwise

#endif  // LAYERWISE_SRC_GUARDED_H_
