// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_ROOTS_H_
#define LAYERWISE_SRC_ROOTS_H_

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "descriptor.h"
#include "layerwise/status.h"

namespace layerwise {

// What is done at a symbolic link on the way to a name.
enum class Links {
  kRefused,   // ELOOP: whoever makes, writes, renames or removes
  kFollowed,  // if this user, root or the root directory's owner made it: whoever reads
};

// A name in a directory: what the *at calls take.
class Place {
 public:
  int dir() const { return dir_; }
  const char* name() const { return name_.c_str(); }

 private:
  friend class Roots;

  int dir_ = AT_FDCWD;
  std::string name_;
  std::shared_ptr<const Descriptor> held_;  // the directory, unless it is the working directory
};

// The directories that an Env stays in (Env::Confine), and the way to every name below
// them: from the root's descriptor, one name after the other, so that no link that
// somebody puts on the way leads it elsewhere.
//
// The root itself may be reached through links. It is opened by the first call that
// needs it. From then on a path that leads to another directory is ESTALE: nothing goes
// on in a directory that was moved away, and nothing begins in the one that is there now.
//
// Threads: every method may be called by several threads at once.
class Roots {
 public:
  void Add(const std::string& path);

  // Closes what is open of the roots, as soon as no call uses it any more. The next call
  // opens them again, and they must be the same; after Add they need not be.
  void LetGo();

  // Where the path's last name is. A path below no root is taken as it is, and so is a
  // root's own.
  Status Find(const char* operation, const std::string& path, Links links, Place* place);

  // An O_PATH descriptor of the directory that the path names. For a path below no root,
  // links are followed in any case.
  Status FindDir(const char* operation, const std::string& path, Links links, Descriptor* dir);

  // If the path is a root's own that was not opened yet: it is this directory, just made.
  Status Pin(const std::string& path, const Descriptor& made);

 private:
  struct Root {
    std::string path;
    std::shared_ptr<const Descriptor> fd;  // null if it is not open
    bool known = false;
    dev_t device = 0;
    ino_t inode = 0;
    uid_t owner = 0;
  };

  Root* Around(const std::string& path);
  Status Open(const char* operation, const std::string& path, Root* root, Place* place);
  static Status Hold(const char* operation, Root* root, Descriptor fd);
  Status Walk(const char* operation, const std::string& path, Root* root, Links links, bool whole, Place* place);
  static Status Step(const char* operation, const std::string& path, const Root& root, Links links, int dir,
                     const std::string& name, const std::string& here, Descriptor* next);

  std::mutex mutex_;
  std::list<Root> roots_;  // none is ever removed
};

// What is at a place, without following a link, must be a regular file: ENOENT, ELOOP for
// a link, EISDIR, EINVAL. What is renamed, replaced or removed is looked at before, since
// a link, a folder or a device is not ours whatever its name; and no device is opened.
Status CheckRegular(const char* operation, const std::string& path, const Place& place);

// The same of an open file.
Status CheckRegular(const char* operation, const std::string& path, const struct stat& info);

}  // namespace layerwise

#endif  // LAYERWISE_SRC_ROOTS_H_
