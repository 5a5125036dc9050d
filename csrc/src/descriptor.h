// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_DESCRIPTOR_H_
#define LAYERWISE_SRC_DESCRIPTOR_H_

#include <sys/types.h>

#include <string>

#include "layerwise/status.h"

namespace layerwise {

// A descriptor that closes itself, and that a forked child does not keep: there it is
// closed at once, and not valid any more. A worker of a data loader would otherwise
// hold locks after its parent's death, and the space of files that were removed.
//
// Threads: external synchronization.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd);  // takes it over; -1 for none
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor() { static_cast<void>(Close("")); }

  bool valid() const;
  int get() const { return fd_; }
  Status Close(const std::string& path);  // idempotent; nothing to do in a forked child

 private:
  int fd_ = -1;
  pid_t process_ = -1;  // that opened it
};

// The same for a descriptor that something else owns: from KeepFromChildren on, forked
// children close it, until LeaveToChildren, which comes right before it is closed.
void KeepFromChildren(int fd);
void LeaveToChildren(int fd);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_DESCRIPTOR_H_
