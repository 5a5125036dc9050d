// SPDX-License-Identifier: Apache-2.0
#include "layerwise/calls.h"

#include <mutex>
#include <new>

#include "deadline.h"
#include "per_process.h"

namespace layerwise {

class OngoingCall::Calls {
 public:
  static Calls* Own() {
    static PerProcess<Calls> own;
    return own.Get();
  }

  std::optional<std::list<Call>::iterator> Begin(const char* operation, const std::string& path) {
    std::list<Call> entry;
    try {
      entry.push_back({operation, path, MonotonicNs()});
    } catch (const std::bad_alloc&) {
      return std::nullopt;  // the call itself may do without memory
    }
    std::lock_guard lock(mutex_);
    list_.splice(list_.end(), entry);
    return std::prev(list_.end());
  }

  void End(std::list<Call>::iterator place) {
    std::list<Call> entry;
    std::lock_guard lock(mutex_);
    entry.splice(entry.end(), list_, place);
  }

  std::vector<Call> All() {
    std::lock_guard lock(mutex_);
    return {list_.begin(), list_.end()};
  }

 private:
  std::mutex mutex_;
  std::list<Call> list_;
};

double Call::Seconds() const { return static_cast<double>(MonotonicNs() - began) * 1e-9; }

OngoingCall::OngoingCall(const char* operation, const std::string& path)
    : calls_(Calls::Own()), place_(calls_->Begin(operation, path)) {}

OngoingCall::~OngoingCall() {
  if (place_) calls_->End(*place_);
}

std::vector<Call> CallsUnderWay() { return OngoingCall::Calls::Own()->All(); }

}  // namespace layerwise
