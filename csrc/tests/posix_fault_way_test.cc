// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "answers.h"
#include "layerwise/posix_env.h"
#include "scratch.h"

// As posix_fault_test.cc, of directories, locks and the way to a name.

namespace layerwise {

TEST_CASE("a directory that can't be opened, read or flushed is an error, and no descriptor is lost") {
  ScratchDir dir;
  PosixEnv env;
  REQUIRE_OK(env.WriteFile(dir / "a", "x", 0600));
  std::vector<std::string> names;
  std::vector<std::string> before, after;
  REQUIRE_OK(env.ListDir("/proc/self/fd", &before));
  for (const auto& [call, nth] : {std::pair{"openat", 0}, std::pair{"openat", 1}, std::pair{"fdopendir", 0},
                                    std::pair{"readdir", 0}, std::pair{"readdir", 1}}) {
    CAPTURE(call);
    const Answered answered(call, EIO, 1, nth);
    CHECK_ERRNO(env.ListDir(dir.path(), &names), EIO);
  }
  for (const auto& [call, nth] : {std::pair{"openat", 0}, std::pair{"openat", 1}, std::pair{"fsync", 0}}) {
    CAPTURE(call);
    const Answered answered(call, EIO, 1, nth);
    CHECK_ERRNO(env.SyncDir(dir.path()), EIO);
  }
  uint64_t type = 0;
  {
    const Answered answered("fstatfs", EIO);
    CHECK_ERRNO(env.FileSystem(dir.path(), &type), EIO);
  }
  REQUIRE_OK(env.ListDir("/proc/self/fd", &after));
  CHECK(after.size() == before.size());
  CHECK_ERRNO(env.FileSystem(dir / "missing", &type), ENOENT);
  REQUIRE_OK(env.FileSystem(dir.path(), &type));
  struct statfs info;
  REQUIRE(statfs(dir.path().c_str(), &info) == 0);
  CHECK(type == static_cast<uint32_t>(info.f_type));
  FileInfo there;
  REQUIRE_OK(env.Stat(dir.path(), &there));
  CHECK(there.kind == FileKind::kDirectory);
  REQUIRE_OK(env.ListDir(dir.path(), &names));
  CHECK(names == std::vector<std::string>{"a"});
}

TEST_CASE("a lock that the kernel refuses or can't keep is an error, and what it holds is no guess") {
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<FileLock> lock;
  bool mine = true;
  std::string data;
  const std::string path = dir / "l";
  for (const auto& [error, expected] : {std::pair{EACCES, EAGAIN}, std::pair{ENOLCK, ENOLCK}}) {
    const Answered answered("F_OFD_SETLK", error);
    CHECK_ERRNO(env.Lock(path, 0600, &lock), expected);
  }
  {
    const Answered answered("openat", ENOSPC);
    CHECK_ERRNO(env.Lock(dir / "new", 0600, &lock), ENOSPC);
  }
  {
    // Removed between the two tries to create and to open it: it is created then.
    const Answered meanwhile("fstatat", [&] { REQUIRE(unlink(path.c_str()) == 0); });
    REQUIRE_OK(env.Lock(path, 0600, &lock));
  }
  REQUIRE_OK(lock->Write("owner"));
  for (const char* call : {"pwrite", "ftruncate", "fdatasync"}) {
    const Answered answered(call, EIO);
    const Status status = lock->Write("other");
    CHECK_ERRNO(status, EIO);
    CHECK(status.path() == path);
  }
  for (const char* call : {"fstat", "pread"}) {
    const Answered answered(call, EIO);
    CHECK_ERRNO(lock->Read(100, &data), EIO);
    CHECK(data.empty());
  }
  for (const char* call : {"fstat", "fstatat"}) {
    const Answered answered(call, EIO);
    CHECK_ERRNO(lock->HeldPathIsMine(&mine), EIO);
    CHECK(!mine);
  }
  for (const int gone : {ENOENT, ENOTDIR}) {
    const Answered answered("fstatat", gone);
    REQUIRE_OK(lock->HeldPathIsMine(&mine));
    CHECK(!mine);
  }
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(mine);
  // Another file of the same name is not the one that is locked.
  REQUIRE(unlink(path.c_str()) == 0);
  REQUIRE_OK(env.WriteFile(path, "theirs", 0600));
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(!mine);
}

TEST_CASE("a hold takes what rights there are, and misses no removal") {
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<FileLock> lock;
  const std::string path = dir / "f";
  REQUIRE_OK(env.WriteFile(path, "x", 0600));
  for (const int error : {EACCES, EROFS}) {  // not to be opened for writing: a lock needs no more than to read it
    const Answered answered("openat", error);
    REQUIRE_OK(env.Hold(path, true, &lock));
    lock.reset();
  }
  {
    const Answered answered("openat", EACCES);
    CHECK_ERRNO(env.Hold(path, false, &lock), EACCES);
  }
  {
    const Answered unknown("fstatat", EIO, 1, 1);
    CHECK_ERRNO(env.Hold(path, true, &lock), EIO);
  }
  {
    const Answered replaced("fstatat", [&] {
      REQUIRE(unlink(path.c_str()) == 0);
      REQUIRE(mkdir(path.c_str(), 0700) == 0);
    }, 1);
    CHECK_ERRNO(env.Hold(path, true, &lock), ENOENT);
  }
  CHECK_ERRNO(env.Hold(path, true, &lock), EISDIR);
  env.Confine(dir.path());
  CHECK_ERRNO(env.Hold(dir / "no/f", true, &lock), ENOENT);
  CHECK(lock == nullptr);
}

TEST_CASE("below a root a step that fails is an error, and no other way is taken") {
  ScratchDir dir;
  PosixEnv env;
  const std::string root = dir / "root";
  REQUIRE_OK(env.MakeDir(root, 0700));
  REQUIRE_OK(env.MakeDir(root + "/d", 0700));
  REQUIRE_OK(env.WriteFile(root + "/d/f", "x", 0600));
  REQUIRE(symlink("d", (root + "/link").c_str()) == 0);
  env.Confine(root);
  std::string data;
  std::vector<std::string> names;
  FileInfo info;
  {
    const Answered answered("fstat", EIO);
    const Status status = env.ReadFile(root + "/d/f", 1, &data);  // of the root, when it is opened first
    CHECK_ERRNO(status, EIO);
    CHECK(status.path() == root);
  }
  REQUIRE_OK(env.ReadFile(root + "/link/f", 1, &data));
  for (const auto& [call, after, error] : {std::tuple{"openat", 0, EMFILE}, std::tuple{"openat", 1, EMFILE},
                                           std::tuple{"openat", 2, EMFILE}, std::tuple{"readlinkat", 0, EIO}}) {
    CAPTURE(call);
    CAPTURE(after);
    const Answered answered(call, error, 1, after);
    CHECK_ERRNO(env.Stat(root + "/link/f", &info), error);
  }
  {
    const Answered answered("fstat", EIO, 1, 1);  // of the link; the first is the root's
    CHECK_ERRNO(env.Stat(root + "/link/f", &info), EIO);
  }
  {
    const Answered meanwhile("openat", [&] {
      REQUIRE(unlink((root + "/link").c_str()) == 0);
      REQUIRE_OK(env.WriteFile(root + "/link", "a file by now", 0600));
    }, 1);
    CHECK_ERRNO(env.Stat(root + "/link/f", &info), ENOTDIR);
  }
  {
    const Answered answered("openat", EMFILE, 1, 1);  // the folder is found and can't be opened
    CHECK_ERRNO(env.ListDir(root + "/d", &names), EMFILE);
  }
  {
    // A lock whose folder can't be looked at is not said to be lost.
    std::unique_ptr<FileLock> lock;
    bool mine = true;
    REQUIRE_OK(env.Lock(root + "/d/l", 0600, &lock));
    {
      const Answered answered("openat", EMFILE);
      CHECK_ERRNO(lock->HeldPathIsMine(&mine), EMFILE);
    }
    REQUIRE_OK(lock->HeldPathIsMine(&mine));
    CHECK(mine);
    REQUIRE(rename((root + "/d").c_str(), (root + "/away").c_str()) == 0);
    REQUIRE_OK(lock->HeldPathIsMine(&mine));  // ENOENT
    CHECK(!mine);
    REQUIRE_OK(env.WriteFile(root + "/d", "x", 0600));
    REQUIRE_OK(lock->HeldPathIsMine(&mine));  // ENOTDIR
    CHECK(!mine);
    REQUIRE(unlink((root + "/d").c_str()) == 0);
    REQUIRE(symlink("away", (root + "/d").c_str()) == 0);
    REQUIRE_OK(lock->HeldPathIsMine(&mine));  // ELOOP
    CHECK(!mine);
  }
}

TEST_CASE("a root that was just made and can't be looked at is an error, and no root is opened unseen") {
  ScratchDir dir;
  PosixEnv env;
  const std::string root = dir / "new";
  env.Confine(root);
  {
    const Answered answered("openat", EMFILE, 1, 1);  // the first is that of MakeExactly
    CHECK_ERRNO(env.MakeDir(root, 0700), EMFILE);
  }
  // The file system's own root is one as well.
  PosixEnv everywhere;
  std::string data;
  everywhere.Confine("//");
  REQUIRE_OK(everywhere.WriteFile(root + "/f", "x", 0600));
  REQUIRE_OK(everywhere.ReadFile(root + "/f", 1, &data));
  CHECK(data == "x");
  std::vector<std::string> names;
  REQUIRE_OK(everywhere.ListDir("/", &names));
  CHECK(!names.empty());
}

}  // namespace layerwise
