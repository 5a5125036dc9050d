// SPDX-License-Identifier: Apache-2.0
#include "roots.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <utility>
#include <vector>

#include "posix_file.h"

namespace layerwise {

namespace {

constexpr int kWay = O_PATH | O_DIRECTORY | O_CLOEXEC;

Status LinkError(const char* operation, const std::string& link, const char* rule) {
  return Status::IoError(ELOOP, std::string(operation) + ": a symbolic link " + rule, link);
}

constexpr const char* kNothingThrough = "is there, and nothing is written or removed through one";

}  // namespace

void Roots::Add(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  const std::string root = end == std::string::npos ? "/" : path.substr(0, end + 1);
  std::lock_guard lock(mutex_);
  for (Root& known : roots_) {
    if (known.path != root) continue;
    if (known.fd == nullptr) known.known = false;
    return;
  }
  roots_.emplace_back().path = root;
}

void Roots::LetGo() {
  std::lock_guard lock(mutex_);
  for (Root& root : roots_) root.fd.reset();
}

// The innermost.
Roots::Root* Roots::Around(const std::string& path) {
  std::lock_guard lock(mutex_);
  Root* found = nullptr;
  for (Root& root : roots_) {
    const size_t n = root.path.size();
    const bool around = path.compare(0, n, root.path) == 0 &&
                        (path.size() == n || path[n] == '/' || root.path.back() == '/');
    if (around && (found == nullptr || n > found->path.size())) found = &root;
  }
  return found;
}

// REQUIRES: the mutex is held.
Status Roots::Hold(const char* operation, Root* root, Descriptor fd) {
  struct stat info;
  if (fstat(fd.get(), &info) != 0) return PosixError("fstat", root->path);
  if (root->known && (info.st_dev != root->device || info.st_ino != root->inode)) {
    return Status::IoError(ESTALE, std::string(operation) + ": this is another directory than the one that was opened",
                           root->path);
  }
  if (!root->known) {
    root->device = info.st_dev;
    root->inode = info.st_ino;
    root->owner = info.st_uid;
    root->known = true;
  }
  if (root->fd == nullptr || !root->fd->valid()) root->fd = std::make_shared<const Descriptor>(std::move(fd));
  return Status::Ok();
}

Status Roots::Open(const char* operation, const std::string& path, Root* root, Place* place) {
  // Not under the lock: a disk that does not answer would hold up every call.
  Descriptor there(open(root->path.c_str(), kWay));
  if (!there.valid()) return PosixError(operation, path);
  std::lock_guard lock(mutex_);
  Status status = Hold(operation, root, std::move(there));
  if (!status.ok()) return status;
  place->held_ = root->fd;
  place->dir_ = root->fd->get();
  return status;
}

Status Roots::Pin(const std::string& path, const Descriptor& made) {
  Root* const root = Around(path);
  if (root == nullptr || path != root->path) return Status::Ok();
  Descriptor fd(openat(made.get(), ".", kWay));
  if (!fd.valid()) return PosixError("open directory", path);
  std::lock_guard lock(mutex_);
  return Hold("make directory", root, std::move(fd));
}

Status Roots::Step(const char* operation, const std::string& path, const Root& root, Links links, int dir,
                   const std::string& name, const std::string& here, Descriptor* next) {
  Descriptor fd(openat(dir, name.c_str(), kWay | O_NOFOLLOW));
  if (fd.valid()) {
    *next = std::move(fd);
    return Status::Ok();
  }
  if (errno != ENOTDIR && errno != ELOOP) return PosixError(operation, path);
  // The link itself is opened: what is read of it is what was looked at.
  const Descriptor link(openat(dir, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  struct stat info;
  if (!link.valid() || fstat(link.get(), &info) != 0) return PosixError(operation, path);
  if (!S_ISLNK(info.st_mode)) return Status::IoError(ENOTDIR, operation, path);
  if (links == Links::kRefused) return LinkError(operation, here, kNothingThrough);
  if (info.st_uid != geteuid() && info.st_uid != 0 && info.st_uid != root.owner) {
    return LinkError(operation, here, "of another user is there, and it is not followed");
  }
  char target[PATH_MAX];
  const ssize_t length = readlinkat(link.get(), "", target, sizeof(target));
  if (length < 0) return PosixError(operation, path);
  if (length == static_cast<ssize_t>(sizeof(target))) return Status::IoError(ENAMETOOLONG, operation, here);
  *next = Descriptor(openat(dir, std::string(target, static_cast<size_t>(length)).c_str(), kWay));
  return next->valid() ? Status::Ok() : PosixError(operation, path);
}

// To the directory of the path's last name, or, if `whole`, to the directory that it is:
// the place's name is "." then.
Status Roots::Walk(const char* operation, const std::string& path, Root* root, Links links, bool whole,
                   Place* place) {
  std::vector<std::string> names;
  for (size_t at = root->path.size(); at < path.size();) {
    const size_t end = std::min(path.find('/', at), path.size());
    const std::string name = path.substr(at, end - at);
    at = end + 1;
    if (name.empty() || name == ".") continue;
    if (name == "..") return Status::IoError(EINVAL, std::string(operation) + ": a path with .. in it", path);
    names.push_back(name);
  }
  Status status = Open(operation, path, root, place);
  if (!status.ok()) return status;
  place->name_.assign(1, '.');
  if (!whole && !names.empty()) {
    place->name_ = names.back();
    names.pop_back();
  }
  std::string here = root->path;
  for (const std::string& name : names) {
    if (here.back() != '/') here += '/';
    here += name;
    Descriptor next;
    status = Step(operation, path, *root, links, place->dir_, name, here, &next);
    if (!status.ok()) return status;
    place->held_ = std::make_shared<const Descriptor>(std::move(next));
    place->dir_ = place->held_->get();
  }
  return status;
}

Status Roots::Find(const char* operation, const std::string& path, Links links, Place* place) {
  Root* const root = Around(path);
  if (root != nullptr && path != root->path) return Walk(operation, path, root, links, false, place);
  place->name_ = path;
  return Status::Ok();
}

Status Roots::FindDir(const char* operation, const std::string& path, Links links, Descriptor* dir) {
  Place place;
  place.name_ = path;
  if (Root* const root = Around(path); root != nullptr) {
    Status status = Walk(operation, path, root, links, true, &place);
    if (!status.ok()) return status;
  }
  *dir = Descriptor(openat(place.dir(), place.name(), kWay));
  return dir->valid() ? Status::Ok() : PosixError(operation, path);
}

Status CheckRegular(const char* operation, const std::string& path, const struct stat& info) {
  if (S_ISREG(info.st_mode)) return Status::Ok();
  if (S_ISLNK(info.st_mode)) return LinkError(operation, path, "is there, which is no file of ours");
  if (S_ISDIR(info.st_mode)) return Status::IoError(EISDIR, operation, path);
  return Status::IoError(EINVAL, std::string(operation) + ": what is not a regular file", path);
}

Status CheckRegular(const char* operation, const std::string& path, const Place& place) {
  struct stat info;
  if (fstatat(place.dir(), place.name(), &info, AT_SYMLINK_NOFOLLOW) != 0) return PosixError(operation, path);
  return CheckRegular(operation, path, info);
}

}  // namespace layerwise
