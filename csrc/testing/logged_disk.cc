// SPDX-License-Identifier: Apache-2.0
#include "logged_disk.h"

#include <fnmatch.h>

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

// The name of the operation in logs and patterns.
const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kMakeDir:
      return "make_dir";
    case Kind::kCreate:
      return "create";
    case Kind::kWrite:
      return "write";
    case Kind::kAllocate:
      return "allocate";
    case Kind::kTruncate:
      return "truncate";
    case Kind::kSync:
      return "sync";
    case Kind::kRename:
      return "rename";
    case Kind::kUnlink:
      return "unlink";
    case Kind::kRemoveDir:
      return "remove_dir";
    case Kind::kSyncDir:
      return "sync_dir";
    case Kind::kMark:
      break;
  }
  return "mark";
}

std::string Describe(const DiskOp& op, const std::string& path, const std::string& to) {
  const std::string text = std::string(KindName(op.kind)) + " " + path;
  switch (op.kind) {
    case Kind::kWrite:
      return text + " offset=" + std::to_string(op.offset) + " bytes=" + std::to_string(op.data.size());
    case Kind::kAllocate:
    case Kind::kTruncate:
      return text + " size=" + std::to_string(op.offset);
    case Kind::kRename:
      return text + " -> " + to;
    default:
      return text;
  }
}

}  // namespace

std::vector<std::pair<size_t, std::string>> LoggedDisk::Marks() const {
  const size_t prefix = std::string(KindName(Kind::kMark)).size() + 1;
  std::vector<std::pair<size_t, std::string>> marks;
  for (size_t i = 0; i < log_.size(); ++i) {
    if (log_[i].kind == Kind::kMark) marks.emplace_back(i, texts_[i].substr(prefix));
  }
  return marks;
}

void LoggedDisk::Drop(std::string operation, std::string pattern) {
  drops_.emplace_back(std::move(operation), std::move(pattern));
}

bool LoggedDisk::Before(const DiskOp& op, const std::string& path, const std::string& to) {
  for (const auto& [operation, pattern] : drops_) {
    if (operation != KindName(op.kind)) continue;
    if (fnmatch(pattern.c_str(), path.c_str(), 0) != 0 &&
        (to.empty() || fnmatch(pattern.c_str(), to.c_str(), 0) != 0)) {
      continue;
    }
    ++dropped_;
    return false;
  }
  log_.push_back(op);
  texts_.push_back(Describe(op, path, to));
  return true;
}

}  // namespace layerwise
