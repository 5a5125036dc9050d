// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTING_FAULT_PLAN_H_
#define LAYERWISE_TESTING_FAULT_PLAN_H_

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "layerwise/status.h"

namespace layerwise {

// Which operations of a FaultEnv fail or are slow, and what was done so far.
// Threads: every method may be called by several threads at once.
class FaultPlan {
 public:
  struct Rule {
    std::optional<uint64_t> index;         // of the operation; any if not set
    std::optional<std::string> operation;  // its kind; any if not set
    std::string path_pattern = "*";        // fnmatch on the path; "*" matches "/" too
    int error_number = 0;
    int times = 1;  // how often the rule still holds; forever if negative
    bool short_write = false;
    double delay_s = 0;  // if not 0, the operation is slow and does not fail
    bool no_memory = false;  // it throws std::bad_alloc
  };

  // What to do with an operation.
  struct Verdict {
    Status status;
    bool short_write = false;
  };

  // InvalidArgument if the rule names an operation that there is none of.
  Status Add(Rule rule);
  // What is delayed goes on at once.
  void Clear();

  // Numbers the operation, waits if it is to be slow, and decides. `also` is a
  // second path (the target of a rename), or empty.
  Verdict Decide(const std::string& operation, const std::string& path, const std::string& also = "");

  uint64_t operations() const;
  uint64_t injected() const;
  std::vector<std::string> trace() const;

 private:
  mutable std::mutex mutex_;
  std::vector<Rule> rules_;
  std::vector<std::string> trace_;
  uint64_t injected_ = 0;
  uint64_t clears_ = 0;
  std::condition_variable cleared_;
};

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_FAULT_PLAN_H_
