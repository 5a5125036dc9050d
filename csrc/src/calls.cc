#include "layerwise/calls.h"

#include <unistd.h>

#include <atomic>
#include <mutex>

#include "deadline.h"

namespace layerwise {

// Of one process. Never destroyed: calls may go on during its exit.
class OngoingCall::Calls {
 public:
  static Calls* Own() {
    static std::atomic<Calls*> own{nullptr};
    Calls* known = own.load(std::memory_order_acquire);
    // The parent's lock may be held by a thread that a forked child lacks.
    while (known == nullptr || known->process_ != getpid()) {
      Calls* const made = new Calls;
      if (own.compare_exchange_strong(known, made, std::memory_order_acq_rel)) return made;
      delete made;
    }
    return known;
  }

  std::list<Call>::iterator Begin(const char* operation, const std::string& path) {
    std::list<Call> entry;
    entry.push_back({operation, path, MonotonicNs()});
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
  const int process_ = getpid();
  std::mutex mutex_;
  std::list<Call> list_;
};

OngoingCall::OngoingCall(const char* operation, const std::string& path)
    : calls_(Calls::Own()), place_(calls_->Begin(operation, path)) {}

OngoingCall::~OngoingCall() { calls_->End(place_); }

std::vector<Call> CallsUnderWay() { return OngoingCall::Calls::Own()->All(); }

}  // namespace layerwise
