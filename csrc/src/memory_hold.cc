// SPDX-License-Identifier: Apache-2.0
#include "layerwise/memory_hold.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace layerwise {

namespace {

struct Held {
  MemoryHold::Deleter real = nullptr;
  size_t owners = 0;  // that have our deleter, and those that have called it
  size_t holds = 0;
  size_t owed = 0;  // calls of `real` that wait for the last hold
};

// Never destroyed, since owners are freed during exit as well.
struct Registry {
  std::mutex mutex;  // held while the process forks: a child frees memory too
  std::unordered_map<void*, Held> by_context;
};

Registry& All() {
  static Registry* const all = [] {
    static Registry* const made = new Registry;
    static_cast<void>(pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                                     [] { made->mutex.unlock(); }));
    return made;
  }();
  return *all;
}

std::atomic_ref<MemoryHold::Deleter> DeleterOf(MemoryHold::Owner* owner) {
  return std::atomic_ref<MemoryHold::Deleter>(owner->deleter);
}

void Free(void* context) {
  MemoryHold::Deleter real = nullptr;
  {
    Registry& all = All();
    std::lock_guard lock(all.mutex);
    const auto found = all.by_context.find(context);
    Held& held = found->second;
    if (held.holds > 0) {
      held.owed += 1;
      return;
    }
    real = held.real;
    held.owners -= 1;
    // Before it is freed: then the context's address may come again.
    if (held.owners == 0) all.by_context.erase(found);
  }
  real(context);
}

// REQUIRES: the registry's mutex is held.
Status Problem(const Registry& all, const MemoryHold::Claim& claim) {
  const MemoryHold::Deleter deleter = DeleterOf(claim.owner).load();
  if (claim.owner->data != claim.data) {
    return Status::FailedPrecondition("memory moved while it was looked at");
  }
  if (claim.owner->context == nullptr || deleter == nullptr) {
    return Status::FailedPrecondition("memory that its owner does not free cannot be held");
  }
  const auto found = all.by_context.find(claim.owner->context);
  if (deleter != &Free && found != all.by_context.end() && found->second.real != deleter) {
    return Status::FailedPrecondition("memory that two owners free in two ways cannot be held");
  }
  return Status::Ok();
}

// Returns the owner's context. REQUIRES: the registry's mutex is held, and there is no Problem.
void* Hold(Registry* all, MemoryHold::Owner* owner) {
  Held& held = all->by_context[owner->context];
  const MemoryHold::Deleter deleter = DeleterOf(owner).load();
  if (deleter != &Free) {
    held.real = deleter;
    held.owners += 1;
    DeleterOf(owner).store(&Free);
  }
  held.holds += 1;
  return owner->context;
}

}  // namespace

Status MemoryHold::Take(const std::vector<Claim>& claims, std::unique_ptr<MemoryHold>* hold) {
  std::unique_ptr<MemoryHold> made(new MemoryHold);
  made->contexts_.reserve(claims.size());
  Registry& all = All();
  Status status;
  for (auto claim = claims.begin(); claim != claims.end() && status.ok(); ++claim) {
    std::lock_guard lock(all.mutex);
    status = Problem(all, *claim);
    if (status.ok()) made->contexts_.push_back(Hold(&all, claim->owner));
  }
  if (!status.ok()) return status;  // and what is held by now is let go of
  *hold = std::move(made);
  return Status::Ok();
}

MemoryHold::~MemoryHold() {
  std::vector<std::pair<Deleter, void*>> owed;
  {
    Registry& all = All();
    std::lock_guard lock(all.mutex);
    for (void* const context : contexts_) {
      const auto found = all.by_context.find(context);
      Held& held = found->second;
      held.holds -= 1;
      if (held.holds > 0) continue;
      owed.insert(owed.end(), held.owed, {held.real, context});
      held.owners -= held.owed;
      held.owed = 0;
      if (held.owners == 0) all.by_context.erase(found);
    }
  }
  for (const auto& [real, context] : owed) real(context);
}

MemoryHold::Deleter MemoryHold::deleter() { return &Free; }

size_t MemoryHold::orphans() {
  Registry& all = All();
  std::lock_guard lock(all.mutex);
  size_t count = 0;
  for (const auto& [context, held] : all.by_context) count += held.owners == held.owed ? 1 : 0;
  return count;
}

}  // namespace layerwise
