// SPDX-License-Identifier: Apache-2.0
#include "after_crash.h"

#include <algorithm>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace layerwise {

namespace {

using Kind = DiskOp::Kind;

constexpr size_t kSector = 512;

// An operation on directories, and which of them have not been flushed since.
struct NameOp {
  const DiskOp* op;
  std::set<uint64_t> unsynced;
};

struct FileHistory {
  std::vector<const DiskOp*> changes;
  size_t synced = 0;  // how many of them a flush covers
};

// The bytes of each sector after each change that no flush covers.
std::map<size_t, std::vector<std::string>> SectorVersions(std::string content, std::span<const DiskOp* const> changes) {
  std::map<size_t, std::vector<std::string>> versions;
  for (const DiskOp* op : changes) {
    const size_t before = content.size();
    ApplyToContent(*op, &content);
    size_t begin = op->offset;
    size_t end = op->offset + op->data.size();
    if (op->kind == Kind::kTruncate) end = std::max(before, content.size());
    if (op->kind == Kind::kAllocate) begin = before, end = content.size();
    for (size_t sector = begin / kSector; sector * kSector < end; ++sector) {
      std::string bytes = sector * kSector < content.size() ? content.substr(sector * kSector, kSector) : "";
      bytes.resize(kSector);
      versions[sector].push_back(std::move(bytes));
    }
  }
  return versions;
}

std::string Survivor(const std::string& start, const FileHistory& history, CrashPolicy policy,
                     std::mt19937_64* random) {
  const std::span changes(history.changes);
  std::string old = start;
  for (const DiskOp* op : changes.first(history.synced)) ApplyToContent(*op, &old);
  if (policy == CrashPolicy::kNone || policy == CrashPolicy::kNames) return old;
  std::string latest = old;
  for (const DiskOp* op : changes.subspan(history.synced)) ApplyToContent(*op, &latest);
  if (policy != CrashPolicy::kRandom) return latest;

  const size_t size = (*random)() % 2 == 0 ? old.size() : latest.size();
  std::string content = old;
  for (const auto& [sector, versions] : SectorVersions(old, changes.subspan(history.synced))) {
    const size_t choice = (*random)() % (versions.size() + 1);
    if (choice == 0) continue;
    content.resize(std::max(content.size(), (sector + 1) * kSector));
    content.replace(sector * kSector, kSector, versions[choice - 1]);
  }
  content.resize(size);
  return content;
}

void DropUnreachable(DiskImage* image) {
  std::set<uint64_t> reached = {DiskImage::kRoot};
  std::vector<uint64_t> work = {DiskImage::kRoot};
  while (!work.empty()) {
    const uint64_t inode = work.back();
    work.pop_back();
    for (const auto& [name, child] : image->nodes[inode].entries) {
      if (reached.insert(child).second) work.push_back(child);
    }
  }
  std::erase_if(image->nodes, [&](const auto& node) { return !reached.contains(node.first); });
}

}  // namespace

Status ParsePolicy(std::string_view name, CrashPolicy* policy) {
  static constexpr std::pair<std::string_view, CrashPolicy> kPolicies[] = {
      {"none", CrashPolicy::kNone}, {"all", CrashPolicy::kAll},       {"names", CrashPolicy::kNames},
      {"data", CrashPolicy::kData}, {"random", CrashPolicy::kRandom},
  };
  for (const auto& [text, value] : kPolicies) {
    if (text == name) {
      *policy = value;
      return Status::Ok();
    }
  }
  return Status::InvalidArgument("crash policy '" + std::string(name) +
                                 "'; allowed: none, all, names, data, random");
}

DiskImage AfterCrash(const DiskImage& initial, std::span<const DiskOp> ops, uint64_t seed, CrashPolicy policy) {
  DiskImage image = initial;
  std::vector<NameOp> names;
  std::map<uint64_t, FileHistory> files;
  for (const DiskOp& op : ops) {
    switch (op.kind) {
      case Kind::kMakeDir:
      case Kind::kCreate:
        image.nodes[op.inode].is_dir = op.kind == Kind::kMakeDir;
        image.next_inode = std::max(image.next_inode, op.inode + 1);
        names.push_back({&op, {op.dir}});
        break;
      case Kind::kRename:
        names.push_back({&op, {op.dir, op.to_dir}});
        break;
      case Kind::kUnlink:
      case Kind::kRemoveDir:
        names.push_back({&op, {op.dir}});
        break;
      case Kind::kSyncDir:
        for (NameOp& name : names) name.unsynced.erase(op.inode);
        break;
      case Kind::kSync:
        files[op.inode].synced = files[op.inode].changes.size();
        break;
      case Kind::kMark:
        break;
      default:
        files[op.inode].changes.push_back(&op);
    }
  }
  std::mt19937_64 random(seed);
  for (const NameOp& name : names) {
    bool happened = policy == CrashPolicy::kAll || policy == CrashPolicy::kNames;
    if (policy == CrashPolicy::kRandom) happened = random() % 2 == 0;
    if (name.unsynced.empty() || happened) ApplyToNames(*name.op, &image);
  }
  for (const auto& [inode, history] : files) {
    std::string& content = image.nodes[inode].content;
    content = Survivor(content, history, policy, &random);
  }
  DropUnreachable(&image);
  return image;
}

}  // namespace layerwise
