#ifndef LAYERWISE_BINDINGS_BIND_BUFFERS_H_
#define LAYERWISE_BINDINGS_BIND_BUFFERS_H_

#include <memory>

#include "layerwise/buffer_pool.h"

namespace layerwise {

// What a Python BufferPool holds.
struct PyBuffers {
  std::shared_ptr<BufferPool> it;
};

}  // namespace layerwise

#endif  // LAYERWISE_BINDINGS_BIND_BUFFERS_H_
