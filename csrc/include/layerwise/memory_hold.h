// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_MEMORY_HOLD_H_
#define LAYERWISE_MEMORY_HOLD_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "layerwise/status.h"

namespace layerwise {

// Keeps memory that others own from being freed, whatever they do with it: its owner may
// let go of it, or take other memory in its place, and the old stays until the last hold
// on it ends. Nothing about the memory itself changes, nor its address.
//
// How: an owner has a deleter, which it calls with a context when it lets go. The first
// hold puts another deleter in its place, for good. That one calls the owner's own: at
// once if there is no hold, else when the last one ends.
//
// Survives a fork: parent and child each have their own memory, and free it on their own.
class MemoryHold {
 public:
  using Deleter = void (*)(void* context);

  // What an owner looks like in memory (a torch DataPtr begins so).
  struct Owner {
    uintptr_t data;
    Deleter deleter;
    void* context;
  };

  struct Claim {
    Owner* owner;
    uintptr_t data;  // what it should own
  };

  // FailedPrecondition, with nothing more held, if an owner does not own what it should, or has
  // no context (then it frees nothing, and whoever does is not known), or another deleter
  // than others have for the same context.
  // REQUIRES: until it returns every owner is there, and nobody else changes it. Its
  // context is its own, and its deleter may run on any thread.
  static Status Take(const std::vector<Claim>& claims, std::unique_ptr<MemoryHold>* hold);

  // Frees what its owners have let go of meanwhile and nobody else holds.
  ~MemoryHold();
  MemoryHold(const MemoryHold&) = delete;
  MemoryHold& operator=(const MemoryHold&) = delete;

  // The one that a held owner has.
  static Deleter deleter();
  // How many things are held that nobody owns any more.
  static size_t orphans();

 private:
  MemoryHold() = default;

  std::vector<void*> contexts_;
};

}  // namespace layerwise

#endif  // LAYERWISE_MEMORY_HOLD_H_
