// SPDX-License-Identifier: Apache-2.0
#include "memory_env.h"

#include <algorithm>
#include <span>
#include <string_view>

#include "layerwise/hash.h"
#include "logged_disk.h"
#include "memory_disk_env.h"

namespace layerwise {

namespace {

void AddTree(const LoggedDisk& disk, uint64_t inode, Xxh3Stream* hash) {
  const DiskImage::Node& node = disk.node(inode);
  const uint64_t parts[] = {node.is_dir, node.is_dir ? node.entries.size() : node.content.size()};
  hash->Update(parts, sizeof(parts));
  hash->Update(node.content.data(), node.content.size());
  for (const auto& [name, child] : node.entries) {
    hash->Update(name.c_str(), name.size() + 1);
    AddTree(disk, child, hash);
  }
}

}  // namespace

MemoryEnv::MemoryEnv() : MemoryEnv(std::make_shared<LoggedDisk>(DiskImage())) {}

MemoryEnv::MemoryEnv(std::shared_ptr<LoggedDisk> disk) : MemoryEnv(disk, std::make_unique<MemoryDiskEnv>(disk)) {}

MemoryEnv::MemoryEnv(std::shared_ptr<LoggedDisk> disk, std::unique_ptr<Env> env)
    : EnvWrapper(env.get()), disk_(std::move(disk)), env_(std::move(env)) {}

MemoryEnv::~MemoryEnv() = default;

size_t MemoryEnv::LogSize() const {
  std::lock_guard lock(disk_->mutex());
  return disk_->log().size();
}

std::string MemoryEnv::LogEntry(size_t i) const {
  std::lock_guard lock(disk_->mutex());
  return disk_->text(i);
}

void MemoryEnv::Mark(const std::string& text) {
  std::lock_guard lock(disk_->mutex());
  disk_->Mark(text);
}

std::vector<std::pair<size_t, std::string>> MemoryEnv::Marks() const {
  std::lock_guard lock(disk_->mutex());
  return disk_->Marks();
}

std::unique_ptr<MemoryEnv> MemoryEnv::Crash(size_t prefix, uint64_t seed, CrashPolicy policy) const {
  std::lock_guard lock(disk_->mutex());
  const auto ops = std::span(disk_->log()).first(prefix);
  auto left = std::make_shared<LoggedDisk>(AfterCrash(disk_->initial(), ops, seed, policy));
  return std::unique_ptr<MemoryEnv>(new MemoryEnv(std::move(left)));
}

uint64_t MemoryEnv::Fingerprint() const {
  std::lock_guard lock(disk_->mutex());
  Xxh3Stream hash;
  AddTree(*disk_, DiskImage::kRoot, &hash);
  return hash.Digest();
}

Status MemoryEnv::Drop(const std::string& operation, const std::string& path_pattern) {
  static constexpr std::string_view kAllowed[] = {"sync", "sync_dir", "rename", "write", "truncate"};
  if (std::find(std::begin(kAllowed), std::end(kAllowed), operation) == std::end(kAllowed)) {
    return Status::InvalidArgument("operation '" + operation + "'; allowed: sync, sync_dir, rename, write, truncate");
  }
  std::lock_guard lock(disk_->mutex());
  disk_->Drop(operation, path_pattern);
  return Status::Ok();
}

uint64_t MemoryEnv::dropped() const {
  std::lock_guard lock(disk_->mutex());
  return disk_->dropped();
}

}  // namespace layerwise
