// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "answers.h"
#include "layerwise/nvm_env.h"
#include "layerwise/posix_env.h"
#include "scratch.h"

namespace layerwise {

namespace {

// A root "ck" with a folder "d", and beside it "out" with the file "f" and the empty folder "e". "ck/link" leads to
// "out".
struct Tree {
  Tree() : root(dir / "ck"), out(dir / "out"), env(OnNvm() ? static_cast<Env&>(nvm) : posix) {
    REQUIRE_OK(env.MakeDir(root, 0700));
    REQUIRE_OK(env.MakeDir(root + "/d", 0700));
    REQUIRE_OK(env.WriteFile(root + "/d/f", "inside", 0600));
    REQUIRE_OK(env.MakeDir(out, 0711));
    REQUIRE_OK(env.MakeDir(out + "/e", 0711));
    REQUIRE_OK(env.WriteFile(out + "/f", "outside", 0640));
    REQUIRE(symlink("../out", (root + "/link").c_str()) == 0);
    env.Confine(root);
  }

  // Names, content and modes of what is outside.
  std::string Outside() {
    std::string found;
    PosixEnv plain;
    std::vector<std::string> names;
    REQUIRE_OK(plain.ListDir(out, &names));
    for (const std::string& name : names) {
      struct stat info;
      REQUIRE(lstat((out + "/" + name).c_str(), &info) == 0);
      found += name + " " + std::to_string(info.st_mode) + " " + std::to_string(info.st_size) + "\n";
    }
    std::string data;
    REQUIRE_OK(plain.ReadFile(out + "/f", 100, &data));
    return found + data;
  }

  ScratchDir dir;
  const std::string root, out;
  PosixEnv posix;
  NvmEnv nvm;
  Env& env;
};

}  // namespace

TEST_CASE("nothing is made, written, renamed or removed through a link below the root") {
  Tree tree;
  Env& env = tree.env;
  const std::string link = tree.root + "/link", inside = tree.root + "/d/f", before = tree.Outside();
  std::unique_ptr<WritableFile> file;
  std::unique_ptr<FileLock> lock;
  std::optional<DirectIoAlignment> alignment;
  CHECK_ERRNO(env.MakeDir(link + "/new", 0700), ELOOP);
  CHECK_ERRNO(env.NewWritableFile(link + "/new", 0600, false, &file), ELOOP);
  CHECK_ERRNO(env.NewWritableFile(link + "/new", 0600, true, &file), ELOOP);
  CHECK_ERRNO(env.ReuseFile(link + "/f", tree.root + "/new", 0600, false, &file), ELOOP);
  CHECK_ERRNO(env.ReuseFile(inside, link + "/new", 0600, false, &file), ELOOP);
  CHECK_ERRNO(env.Rename(link + "/f", tree.root + "/new"), ELOOP);
  CHECK_ERRNO(env.Rename(inside, link + "/f"), ELOOP);
  CHECK_ERRNO(env.Unlink(link + "/f"), ELOOP);
  CHECK_ERRNO(env.RemoveDir(link + "/e"), ELOOP);
  CHECK_ERRNO(env.Lock(link + "/f", 0600, &lock), ELOOP);
  CHECK_ERRNO(env.DirectIo(link, &alignment), ELOOP);
  const Status status = env.Unlink(link + "/f");
  CHECK(status.path() == link);
  CHECK(status.message().find("nothing is written or removed through one") != std::string::npos);
  // Nor is the link itself taken for a file or a folder.
  CHECK_ERRNO(env.Unlink(link), ELOOP);
  CHECK_ERRNO(env.RemoveDir(link), ENOTDIR);
  CHECK_ERRNO(env.Rename(inside, link), ELOOP);
  CHECK_ERRNO(env.ReuseFile(link, tree.root + "/new", 0600, false, &file), ELOOP);
  CHECK_ERRNO(env.MakeDir(link, 0700), EEXIST);
  FileInfo info;
  REQUIRE_OK(env.Stat(link, &info));
  CHECK(info.kind == FileKind::kLink);
  CHECK(tree.Outside() == before);
  CHECK_ERRNO(env.Unlink(tree.root + "/d/../../out/f"), EINVAL);
  CHECK_ERRNO(env.Unlink(tree.root + "/d/./f/x"), ENOTDIR);
  REQUIRE_OK(env.Unlink(tree.root + "//d/./f"));
}

TEST_CASE("a folder that was linked in is read") {
  Tree tree;
  Env& env = tree.env;
  const std::string link = tree.root + "/link";
  REQUIRE(symlink(tree.out.c_str(), (tree.root + "/absolute").c_str()) == 0);
  REQUIRE(symlink("link", (tree.root + "/twice").c_str()) == 0);
  REQUIRE(symlink("f", (tree.out + "/file").c_str()) == 0);
  REQUIRE(symlink("nowhere", (tree.root + "/dangling").c_str()) == 0);
  for (const char* name : {"/link", "/absolute", "/twice"}) {
    std::string data;
    REQUIRE_OK(env.ReadFile(tree.root + name + "/f", 100, &data));
    CHECK(data == "outside");
    std::vector<std::string> names;
    REQUIRE_OK(env.ListDir(tree.root + name, &names));
    CHECK(names == std::vector<std::string>{"e", "f", "file"});
    REQUIRE_OK(env.SyncDir(tree.root + name));
    FileInfo info;
    REQUIRE_OK(env.Stat(tree.root + name + "/f", &info));
    CHECK(info.size == 7);
  }
  std::unique_ptr<ReadableFile> file;
  CHECK_ERRNO(env.NewReadableFile(link + "/file", false, &file), ELOOP);
  CHECK_ERRNO(env.NewReadableFile(tree.root + "/dangling/f", false, &file), ENOENT);
}

TEST_CASE("a link of another user is not followed") {
  if (geteuid() != 0) {
    MESSAGE("skipped: only root can give a link away");
    return;
  }
  Tree tree;
  const std::string link = tree.root + "/link";
  std::string data;
  std::vector<std::string> names;
  REQUIRE(lchown(link.c_str(), 65534, 65534) == 0);
  CHECK_ERRNO(tree.env.ReadFile(link + "/f", 100, &data), ELOOP);
  CHECK_ERRNO(tree.env.ListDir(link, &names), ELOOP);
  CHECK(tree.env.ListDir(link, &names).message().find("of another user") != std::string::npos);
  // The owner's of the whole directory are his business: somebody reads a colleague's checkpoints.
  PosixEnv later;
  REQUIRE(chown(tree.root.c_str(), 65534, 65534) == 0);
  later.Confine(tree.root + "/");
  REQUIRE_OK(later.ReadFile(link + "/f", 100, &data));
}

TEST_CASE("the root is reached through links, and stays the one that it was") {
  Tree tree;
  REQUIRE(symlink("ck", (tree.dir / "way").c_str()) == 0);
  PosixEnv env;
  const std::string root = tree.dir / "way";
  env.Confine(root);
  std::unique_ptr<FileLock> lock;
  REQUIRE_OK(env.Lock(root + "/owner", 0600, &lock));
  REQUIRE_OK(env.WriteFile(root + "/d/new", "x", 0600));
  bool mine = false;
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(mine);
  // It leads to another directory now, where the same names are.
  const std::string other = tree.dir / "other";
  REQUIRE_OK(env.MakeDir(other, 0700));
  REQUIRE_OK(env.MakeDir(other + "/d", 0700));
  REQUIRE_OK(env.WriteFile(other + "/d/new", "y", 0600));
  REQUIRE(unlink(root.c_str()) == 0);
  REQUIRE(symlink("other", root.c_str()) == 0);
  std::string data;
  std::vector<std::string> names;
  CHECK_ERRNO(env.Unlink(root + "/d/new"), ESTALE);
  CHECK_ERRNO(env.WriteFile(root + "/d/newer", "x", 0600), ESTALE);
  CHECK_ERRNO(env.ReadFile(root + "/d/new", 1, &data), ESTALE);
  CHECK_ERRNO(env.ListDir(root, &names), ESTALE);
  CHECK_ERRNO(env.SyncDir(root), ESTALE);
  CHECK(env.SyncDir(root).path() == root);
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(!mine);
  REQUIRE(unlink(root.c_str()) == 0);
  CHECK_ERRNO(env.ListDir(root, &names), ENOENT);
  CHECK_ERRNO(env.MakeDir(root, 0700), ESTALE);  // made, and not the one
  REQUIRE(rmdir(root.c_str()) == 0);
  REQUIRE(symlink("ck", root.c_str()) == 0);
  REQUIRE_OK(env.ReadFile(root + "/d/new", 1, &data));
  CHECK(data == "x");
}

TEST_CASE("a root that was let go of is not open, and is still the one that it was until it is named again") {
  Tree tree;
  std::vector<std::string> names;
  const auto open_here = [&] {
    int found = 0;
    for (int fd = 3; fd < 256; ++fd) {
      char path[4096];
      const ssize_t length = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
      found += std::string_view(path, length > 0 ? static_cast<size_t>(length) : 0).find(tree.root) == 0;
    }
    return found;
  };
  REQUIRE_OK(tree.env.ListDir(tree.root, &names));
  CHECK(open_here() == 1);
  tree.env.LetGo();
  CHECK(open_here() == 0);
  REQUIRE(rename(tree.root.c_str(), (tree.dir / "away").c_str()) == 0);
  REQUIRE(mkdir(tree.root.c_str(), 0700) == 0);
  CHECK_ERRNO(tree.env.ListDir(tree.root, &names), ESTALE);
  tree.env.Confine(tree.root);
  REQUIRE_OK(tree.env.ListDir(tree.root, &names));
  CHECK(names.empty());
}

TEST_CASE("a root may be made after it was named, and roots lie in each other") {
  ScratchDir dir;
  PosixEnv env;
  const std::string outer = dir / "a", inner = dir / "a/b";
  env.Confine(inner);
  env.Confine(outer + "//");
  env.Confine(outer);
  std::vector<std::string> names;
  CHECK_ERRNO(env.ListDir(outer, &names), ENOENT);
  REQUIRE_OK(env.MakeDir(outer, 0700));
  REQUIRE_OK(env.MakeDir(inner, 0700));
  REQUIRE_OK(env.WriteFile(inner + "/f", "x", 0600));
  REQUIRE_OK(env.ListDir(outer, &names));
  CHECK(names == std::vector<std::string>{"b"});
  CHECK_ERRNO(env.RemoveDir(inner), ENOTEMPTY);
  REQUIRE_OK(env.Unlink(inner + "/f"));
  REQUIRE_OK(env.RemoveDir(inner));
}

TEST_CASE("a mode goes to the directory that was made, whatever its name leads to") {
  ScratchDir dir;
  Env& env = DiskEnv();
  const mode_t before = umask(0777);
  const Status made = env.MakeDir(dir / "closed", 0750);
  umask(before);
  REQUIRE_OK(made);
  struct stat info;
  REQUIRE(stat((dir / "closed").c_str(), &info) == 0);
  CHECK((info.st_mode & 07777) == 0750);
  REQUIRE_OK(env.RemoveDir(dir / "closed"));
}

TEST_CASE("what is no regular file is neither opened nor removed nor replaced") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<ReadableFile> in;
  std::unique_ptr<FileLock> lock;
  std::unique_ptr<WritableFile> out;
  REQUIRE(mkfifo((dir / "pipe").c_str(), 0600) == 0);
  REQUIRE(mknod((dir / "socket").c_str(), S_IFSOCK | 0600, 0) == 0);
  REQUIRE_OK(env.WriteFile(dir / "f", "x", 0600));
  std::vector<std::string> names = {"pipe", "socket"};
  if (mknod((dir / "device").c_str(), S_IFCHR | 0600, 0) == 0) names.push_back("device");
  for (const std::string& name : names) {
    CHECK_ERRNO(env.NewReadableFile(dir / name, false, &in), EINVAL);
    CHECK_ERRNO(env.Lock(dir / name, 0600, &lock), EINVAL);
    CHECK_ERRNO(env.ReuseFile(dir / name, dir / "new", 0600, false, &out), EINVAL);
    CHECK_ERRNO(env.Rename(dir / "f", dir / name), EINVAL);
    CHECK_ERRNO(env.Unlink(dir / name), EINVAL);
    FileInfo info;
    REQUIRE_OK(env.Stat(dir / name, &info));
    CHECK(info.kind == FileKind::kOther);
  }
}

TEST_CASE("a forked child has no descriptor of the root, and finds its way anew") {
  Tree tree;
  std::string data;
  REQUIRE_OK(tree.env.ReadFile(tree.root + "/d/f", 100, &data));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int kept = 0;
    for (int fd = 3; fd < 256; ++fd) {
      char path[4096];
      const ssize_t length = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
      kept += std::string_view(path, length > 0 ? static_cast<size_t>(length) : 0).find(tree.root) == 0;
    }
    const bool reads = tree.env.ReadFile(tree.root + "/d/f", 100, &data).ok() && data == "inside";
    const bool stays = tree.env.Unlink(tree.root + "/link/f").error_number() == ELOOP;
    Leave(10 * kept + (reads && stays ? 0 : 1));
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

}  // namespace layerwise
