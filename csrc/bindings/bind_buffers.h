// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_BINDINGS_BIND_BUFFERS_H_
#define LAYERWISE_BINDINGS_BIND_BUFFERS_H_

#include <memory>

#include "layerwise/buffer_pool.h"

namespace layerwise {

// What a Python BufferPool holds.
struct PyBuffers {
  std::shared_ptr<BufferPool> it;
};

// Memory of a pool, given to Python. It keeps the pool, and so the mapping, even once
// released: a tensor made from it may still be there, and must not point nowhere.
struct PyBuffer {
  std::shared_ptr<BufferPool> pool;
  BufferPool::Buffer it;
  int views = 0;  // guarded by the GIL, as the rest
};

}  // namespace layerwise

#endif  // LAYERWISE_BINDINGS_BIND_BUFFERS_H_
