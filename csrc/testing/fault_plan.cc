// SPDX-License-Identifier: Apache-2.0
#include "fault_plan.h"

#include <fnmatch.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <string_view>
#include <utility>

namespace layerwise {

namespace {

constexpr std::string_view kOperations[] = {
    "create", "reuse",    "open",     "write",  "read",       "sync",     "allocate", "truncate",
    "rename", "sync_dir", "make_dir", "unlink", "remove_dir", "list_dir", "stat",     "lock"};

bool Matches(const FaultPlan::Rule& rule, uint64_t index, const std::string& operation, const std::string& path,
             const std::string& also) {
  if (rule.times == 0) return false;
  if (rule.index && *rule.index != index) return false;
  if (rule.operation && *rule.operation != operation) return false;
  const char* const pattern = rule.path_pattern.c_str();
  return fnmatch(pattern, path.c_str(), 0) == 0 || (!also.empty() && fnmatch(pattern, also.c_str(), 0) == 0);
}

}  // namespace

Status FaultPlan::Add(Rule rule) {
  if (rule.operation) {
    const std::string_view name = *rule.operation;
    if (std::find(std::begin(kOperations), std::end(kOperations), name) == std::end(kOperations)) {
      std::string message = "operation '" + *rule.operation + "'; allowed:";
      for (std::string_view allowed : kOperations) message.append(" ").append(allowed);
      return Status::InvalidArgument(std::move(message));
    }
  }
  std::lock_guard lock(mutex_);
  rules_.push_back(std::move(rule));
  return Status::Ok();
}

void FaultPlan::Clear() {
  std::lock_guard lock(mutex_);
  rules_.clear();
  ++clears_;
  cleared_.notify_all();
}

FaultPlan::Verdict FaultPlan::Decide(const std::string& operation, const std::string& path, const std::string& also) {
  Verdict verdict;
  double delay_s = 0;
  uint64_t clears = 0;  // as they were when the rules were read: a Clear() since then counts
  {
    std::lock_guard lock(mutex_);
    clears = clears_;
    const uint64_t index = trace_.size();
    trace_.push_back(operation + " " + path + (also.empty() ? "" : " -> " + also));
    for (Rule& rule : rules_) {
      if (!Matches(rule, index, operation, path, also)) continue;
      if (rule.delay_s > 0) {
        delay_s = std::max(delay_s, rule.delay_s);
      } else if (verdict.status.ok()) {
        if (rule.times > 0) --rule.times;
        if (rule.no_memory) throw std::bad_alloc();
        verdict = {Status::IoError(rule.error_number, operation + " (injected)", path), rule.short_write};
        ++injected_;
      }
    }
  }
  if (delay_s > 0) {
    std::unique_lock lock(mutex_);
    cleared_.wait_for(lock, std::chrono::duration<double>(delay_s), [&] { return clears_ != clears; });
  }
  return verdict;
}

uint64_t FaultPlan::operations() const {
  std::lock_guard lock(mutex_);
  return trace_.size();
}

uint64_t FaultPlan::injected() const {
  std::lock_guard lock(mutex_);
  return injected_;
}

std::vector<std::string> FaultPlan::trace() const {
  std::lock_guard lock(mutex_);
  return trace_;
}

}  // namespace layerwise
