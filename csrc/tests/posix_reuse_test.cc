// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "answers.h"
#include "layerwise/aligned_buffer.h"
#include "layerwise/posix_env.h"
#include "living_child.h"
#include "posix_file.h"
#include "scratch.h"
#include "shard_fixture.h"

// Env::ReuseFile on a real file system.

namespace layerwise {

namespace {

// Takes a file over without asking who else has it.
class Careless final : public EnvWrapper {
 public:
  using EnvWrapper::EnvWrapper;
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t, bool,
                   std::unique_ptr<WritableFile>* file) override {
    Status status = Rename(from, to);
    if (!status.ok()) return status;
    Descriptor fd(open(to.c_str(), O_RDWR | O_CLOEXEC));
    REQUIRE(fd.valid());
    *file = std::make_unique<PosixWritableFile>(to, std::move(fd), std::nullopt);
    return status;
  }
};

// Whether somebody who has a spare, in this way, sees other bytes in it once a shard was to be written over it.
// REQUIRES: how is "open", "mapped" or "named".
bool ShardOverwrites(Env* env, const std::string& how) {
  ScratchDir dir;
  const std::string old = Pattern(8192, 7);
  REQUIRE_OK(env->WriteFile(dir / "spare", old, 0600));
  const int fd = open((dir / "spare").c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  void* mapped = nullptr;
  if (how == "mapped") {
    mapped = mmap(nullptr, old.size(), PROT_READ, MAP_SHARED, fd, 0);
    REQUIRE(mapped != MAP_FAILED);
  }
  if (how == "named") REQUIRE(link((dir / "spare").c_str(), (dir / "backup").c_str()) == 0);
  if (how != "open") close(fd);

  ShardFixture f;
  Tensor tensor(Pattern(4096));
  ShardWriter::Target target;
  target.folder = dir / "folder";
  target.folder_mode = 0700;
  target.path = dir / "folder/s";
  target.mode = 0600;
  target.direct = true;
  target.spare = dir / "spare";
  std::unique_ptr<ShardWriter> writer;
  REQUIRE_OK(ShardWriter::Order(env, f.pool.get(), f.Simple(1), target, &writer));
  REQUIRE_OK(writer->SetAddress(0, tensor.address()));
  REQUIRE_OK(writer->Submit(0, 1));
  REQUIRE(writer->Wait(30));
  REQUIRE_OK(writer->Finish(Header()));
  std::string content;
  REQUIRE_OK(env->ReadFile(target.path, 1 << 20, &content));
  CHECK((content == Header() + tensor.content()));  // over it or not, the shard is right

  std::string seen(old.size(), '\0');
  if (how == "mapped") {
    // A mapping past the end of a file that was cut is not to be read.
    seen.assign(static_cast<const char*>(mapped), 4096);
    seen += old.substr(4096);
    munmap(mapped, old.size());
  } else if (how == "open") {
    REQUIRE(pread(fd, seen.data(), seen.size(), 0) >= 0);
    close(fd);
  } else {
    REQUIRE_OK(env->ReadFile(dir / "backup", old.size(), &seen));
  }
  return seen != old;
}

}  // namespace

TEST_CASE("a retired file is taken over with its space and content, under a new name and mode") {
  ScratchDir dir;
  Env& env = DiskEnv();
  const std::string old = Pattern(8192);
  REQUIRE_OK(env.WriteFile(dir / "old", old, 0644));
  struct stat before, after;
  REQUIRE(stat((dir / "old").c_str(), &before) == 0);
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.ReuseFile(dir / "old", dir / "new", 0600, true, &file));
  CHECK(ModeOf(dir / "new") == 0600);
  REQUIRE(stat((dir / "new").c_str(), &after) == 0);
  CHECK(after.st_ino == before.st_ino);
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
  CHECK(file->direct() == alignment.has_value());
  AlignedBuffer buffer;
  REQUIRE_OK(buffer.Reserve(4096));
  std::fill_n(buffer.data(), 4096, 'n');
  REQUIRE_OK(file->Pwrite(buffer.data(), 4096, 0));
  std::string content;
  REQUIRE_OK(env.ReadFile(dir / "new", 8192, &content));
  CHECK(content == std::string(4096, 'n') + old.substr(4096));
  REQUIRE_OK(file->Truncate(4096));
  REQUIRE_OK(file->Sync());
  REQUIRE_OK(env.ReadFile(dir / "new", 8192, &content));
  CHECK(content == std::string(4096, 'n'));
  REQUIRE_OK(file->Close());
  CHECK_ERRNO(file->Truncate(0), EBADF);
  FileInfo info;
  CHECK_ERRNO(env.Stat(dir / "old", &info), ENOENT);
}

TEST_CASE("a file that a reader, a lock, a mapping or another name has is never reused") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file, open_file;
  std::unique_ptr<ReadableFile> reader;
  std::unique_ptr<FileLock> lock;
  for (const char* name : {"read", "locked", "mapped", "linked"}) {
    REQUIRE_OK(env.WriteFile(dir / name, "old", 0600));
  }
  REQUIRE_OK(env.NewReadableFile(dir / "read", false, &reader));
  CHECK_ERRNO(env.ReuseFile(dir / "read", dir / "1", 0600, true, &file), EBUSY);
  REQUIRE_OK(env.NewWritableFile(dir / "written", 0600, true, &open_file));
  CHECK_ERRNO(env.ReuseFile(dir / "written", dir / "2", 0600, true, &file), EBUSY);
  REQUIRE_OK(env.Lock(dir / "locked", 0600, &lock));
  CHECK_ERRNO(env.ReuseFile(dir / "locked", dir / "3", 0600, true, &file), EBUSY);
  REQUIRE(link((dir / "linked").c_str(), (dir / "link").c_str()) == 0);
  CHECK_ERRNO(env.ReuseFile(dir / "linked", dir / "4", 0600, true, &file), EBUSY);
  const int fd = open((dir / "mapped").c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  void* const mapped = mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  REQUIRE(mapped != MAP_FAILED);
  CHECK_ERRNO(env.ReuseFile(dir / "mapped", dir / "5", 0600, true, &file), EBUSY);
  munmap(mapped, 4096);
  CHECK(file == nullptr);
  // What was refused has its new name, and may be unlinked there.
  for (const char* name : {"1", "2", "3", "4", "5"}) CHECK(env.Unlink(dir / name).ok());
}

SHARD_TEST_CASE("a shard is never written over a spare that somebody has open or mapped, or that has another name") {
  for (const char* how : {"open", "mapped", "named"}) {
    CAPTURE(how);
    CHECK(!ShardOverwrites(&DiskEnv(), how));
  }
}

SHARD_TEST_CASE("mutation: taking a spare without asking who else has it is caught") {
  Careless careless(&DiskEnv());
  for (const char* how : {"open", "mapped", "named"}) {
    CAPTURE(how);
    CHECK(ShardOverwrites(&careless, how));
  }
}

TEST_CASE("a file that somebody begins to open while it is asked for is not reused") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file;
  for (const int flags : {O_RDONLY, O_RDWR}) {
    REQUIRE_OK(env.WriteFile(dir / "old", "old", 0600));
    int opener_waits = 0;
    const Answered while_leased("F_GETLEASE", [&] {
      // Where this fails at once, an open that may wait does so until the lease is given back, and then has the file.
      CHECK(open((dir / "new").c_str(), flags | O_CLOEXEC | O_NONBLOCK) == -1);
      if (errno == EWOULDBLOCK) opener_waits += 1;
    });
    const Status status = env.ReuseFile(dir / "old", dir / "new", 0600, false, &file);
    CHECK(opener_waits == 1);
    CHECK_ERRNO(status, EBUSY);
    REQUIRE_OK(env.Unlink(dir / "new"));
  }
}

TEST_CASE("nobody is signalled when another process opens a file that is being taken over") {
  ScratchDir dir;
  Env& env = DiskEnv();
  static std::atomic<int> signals{0};
  struct sigaction before = {}, counting = {};
  counting.sa_handler = [](int) { ++signals; };
  REQUIRE(sigaction(SIGIO, &counting, &before) == 0);
  REQUIRE_OK(env.WriteFile(dir / "a", "old", 0600));
  const std::string a = dir / "a", b = dir / "b";
  const pid_t opener = fork();
  REQUIRE(opener >= 0);
  if (opener == 0) {  // as a backup, an indexer or a virus scanner does
    for (;;) {
      for (const std::string* name : {&a, &b}) {
        const int fd = open(name->c_str(), O_RDONLY | O_CLOEXEC);
        if (fd >= 0) close(fd);
      }
    }
  }
  int taken = 0, refused = 0;
  for (int i = 0; i < 20000 && (i < Rounds(2000) || taken == 0 || refused == 0); ++i) {
    std::unique_ptr<WritableFile> file;
    const Status status = env.ReuseFile(i % 2 ? b : a, i % 2 ? a : b, 0600, false, &file);
    ++(status.ok() ? taken : refused);
    if (!status.ok()) CHECK_MESSAGE(status.error_number() == EBUSY, status.ToString());
  }
  kill(opener, SIGKILL);
  CHECK(waitpid(opener, nullptr, 0) == opener);
  CHECK(sigaction(SIGIO, &before, nullptr) == 0);
  CHECK(taken > 0);
  CHECK(refused > 0);
  CHECK(signals == 0);
}

TEST_CASE("a file that a child process has open is never reused") {
  ScratchDir dir;
  Env& env = DiskEnv();
  REQUIRE_OK(env.WriteFile(dir / "old", "old", 0600));
  LivingChild child([&] { return open((dir / "old").c_str(), O_RDONLY) >= 0; });
  std::unique_ptr<WritableFile> file;
  CHECK_ERRNO(env.ReuseFile(dir / "old", dir / "new", 0600, false, &file), EBUSY);
  child.End();
  CHECK(env.ReuseFile(dir / "new", dir / "newer", 0600, false, &file).ok());
}

TEST_CASE("reuse replaces nothing and takes only regular files") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.WriteFile(dir / "a", "a", 0600));
  REQUIRE_OK(env.WriteFile(dir / "b", "b", 0600));
  CHECK_ERRNO(env.ReuseFile(dir / "a", dir / "b", 0600, false, &file), EEXIST);
  std::string content;
  REQUIRE_OK(env.ReadFile(dir / "a", 1, &content));
  CHECK(content == "a");
  REQUIRE_OK(env.ReadFile(dir / "b", 1, &content));
  CHECK(content == "b");
  CHECK_ERRNO(env.ReuseFile(dir / "missing", dir / "c", 0600, false, &file), ENOENT);
  REQUIRE(symlink("a", (dir / "link").c_str()) == 0);
  CHECK_ERRNO(env.ReuseFile(dir / "link", dir / "d", 0600, false, &file), ELOOP);
  REQUIRE(mkfifo((dir / "pipe").c_str(), 0600) == 0);
  CHECK_ERRNO(env.ReuseFile(dir / "pipe", dir / "e", 0600, false, &file), EINVAL);
  REQUIRE_OK(env.MakeDir(dir / "dir", 0700));
  CHECK_ERRNO(env.ReuseFile(dir / "dir", dir / "f", 0600, false, &file), EISDIR);
}

}  // namespace layerwise
