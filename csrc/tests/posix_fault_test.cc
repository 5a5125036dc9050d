// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "answers.h"
#include "descriptor.h"
#include "layerwise/aligned_buffer.h"
#include "layerwise/posix_env.h"
#include "posix_file.h"
#include "scratch.h"

// What a kernel answers on a bad day, and what others do between two calls: the error names the cause, and what was
// begun is not left half done.

namespace layerwise {

namespace {

std::vector<std::string> Names(const std::string& path) {
  PosixEnv env;
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir(path, &names));
  return names;
}

std::unique_ptr<WritableFile> NewFile(Env* env, const std::string& path, bool direct = false) {
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env->NewWritableFile(path, 0600, direct, &file));
  return file;
}

int OpenDescriptors() { return static_cast<int>(Names("/proc/self/fd").size()); }

}  // namespace

TEST_CASE("an interrupted or short call is gone on with, and the bytes are the same") {
  ScratchDir dir;
  PosixEnv env;
  const std::string data = Pattern(8192);
  const iovec pieces[] = {{const_cast<char*>(data.data()), 4096}, {const_cast<char*>(data.data()) + 4096, 4096}};
  auto file = NewFile(&env, dir / "f");
  for (const int answer : {EINTR, kHalf}) {
    const Answered write("pwrite", answer), vector("pwritev", answer);
    REQUIRE_OK(file->Pwrite(data.data(), data.size(), 0));
    REQUIRE_OK(file->Pwritev(pieces, 2, 8192));
  }
  {
    const Answered allocate("fallocate", EINTR), truncate("ftruncate", EINTR);
    REQUIRE_OK(file->Allocate(1 << 20));
    REQUIRE_OK(file->Truncate(16384));
  }
  {
    const Answered interrupted("close", EINTR);  // the descriptor is gone all the same
    REQUIRE_OK(file->Close());
  }
  for (const int answer : {EINTR, kHalf}) {
    std::unique_ptr<ReadableFile> in;
    REQUIRE_OK(env.NewReadableFile(dir / "f", false, &in));
    const Answered read("pread", answer);
    std::string content(16384, '\0');
    size_t got = 0;
    REQUIRE_OK(in->Pread(content.data(), content.size(), 0, &got));
    CHECK(got == 16384);
    CHECK((content == data + data));
  }
}

TEST_CASE("a failed call is an error that names it and the file, whatever the file") {
  ScratchDir dir;
  PosixEnv env;
  const std::string data = Pattern(4096), path = dir / "f";
  const iovec pieces[] = {{const_cast<char*>(data.data()), 4096}};
  auto file = NewFile(&env, path);
  const auto check = [&](const char* call, int answer, int expected, const std::function<Status()>& action) {
    const Answered answered(call, answer);
    const Status status = action();
    CAPTURE(call);
    CHECK_ERRNO(status, expected);
    CHECK(status.path() == path);
  };
  check("pwrite", EIO, EIO, [&] { return file->Pwrite(data.data(), 4096, 0); });
  check("pwrite", kNothing, EIO, [&] { return file->Pwrite(data.data(), 4096, 0); });
  check("pwritev", ENOSPC, ENOSPC, [&] { return file->Pwritev(pieces, 1, 0); });
  check("pwritev", kNothing, EIO, [&] { return file->Pwritev(pieces, 1, 0); });
  check("fallocate", ENOSPC, ENOSPC, [&] { return file->Allocate(4096); });
  check("ftruncate", EIO, EIO, [&] { return file->Truncate(0); });
  check("fdatasync", ENOSPC, ENOSPC, [&] { return file->Sync(); });
  CHECK_ERRNO(file->Sync(), EIO);  // what a failed flush lost is not said to be there by a later one
  check("close", EIO, EIO, [&] { return file->Close(); });
  REQUIRE_OK(file->Close());
  for (const int unknown : {EOPNOTSUPP, ENOSYS}) {
    auto other = NewFile(&env, dir / ("f" + std::to_string(unknown)));
    const Answered answered("fallocate", unknown);
    REQUIRE_OK(other->Allocate(4096));  // a file system that can't reserve is no error
  }
  std::unique_ptr<ReadableFile> in;
  check("fstat", EIO, EIO, [&] { return env.NewReadableFile(path, false, &in); });
  check("openat", EMFILE, EMFILE, [&] { return env.NewReadableFile(path, false, &in); });
  CHECK(in == nullptr);
  REQUIRE_OK(env.NewReadableFile(path, false, &in));
  std::string content(4096, '\0');
  size_t got = 1;
  check("pread", EIO, EIO, [&] { return in->Pread(content.data(), 4096, 0, &got); });
  CHECK(got == 0);
  check("close", EIO, EIO, [&] { return in->Close(); });
  check("renameat", EXDEV, EXDEV, [&] { return env.Rename(path, dir / "g"); });
  check("unlinkat", EPERM, EPERM, [&] { return env.Unlink(path); });
  CHECK(Names(dir.path()).size() == 3);
}

TEST_CASE("what ends past the largest offset of a file is refused before the kernel sees it") {
  ScratchDir dir;
  PosixEnv env;
  char byte = 'x';
  const iovec piece = {&byte, 1};
  size_t got = 0;
  auto file = NewFile(&env, dir / "f");
  for (const uint64_t offset : {static_cast<uint64_t>(INT64_MAX), UINT64_MAX}) {
    CHECK_ERRNO(file->Pwrite(&byte, 1, offset), EFBIG);
    CHECK_ERRNO(file->Pwritev(&piece, 1, offset), EFBIG);
  }
  CHECK_ERRNO(file->Allocate(UINT64_MAX), EFBIG);
  CHECK_ERRNO(file->Truncate(UINT64_MAX), EFBIG);
  std::unique_ptr<ReadableFile> in;
  REQUIRE_OK(env.NewReadableFile(dir / "f", false, &in));
  CHECK(in->size() == 0);
  CHECK_ERRNO(in->Pread(&byte, 1, UINT64_MAX, &got), EINVAL);
}

TEST_CASE("what could not be made as it was asked for is not left there") {
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<WritableFile> file;
  std::unique_ptr<FileLock> lock;
  std::optional<DirectIoAlignment> alignment;
  const int before = OpenDescriptors();
  {
    const Answered mode("fchmod", EPERM);
    CHECK_ERRNO(env.NewWritableFile(dir / "f", 0600, false, &file), EPERM);
  }
  const mode_t mask = umask(0777);
  {
    const Answered mode("chmod", EPERM);
    const Status made = env.MakeDir(dir / "d", 0700);
    umask(mask);
    CHECK_ERRNO(made, EPERM);
  }
  {
    const Answered opened("openat", EMFILE);
    CHECK_ERRNO(env.NewWritableFile(dir / "f", 0600, false, &file), EMFILE);
  }
  CHECK(Names(dir.path()).empty());
  CHECK(file == nullptr);
  {
    const Answered mode("fchmod", EPERM);
    CHECK_ERRNO(env.Lock(dir / "l", 0600, &lock), EPERM);
  }
  {
    const Answered gone("unlinkat", EROFS);
    CHECK_ERRNO(env.DirectIo(dir.path(), &alignment), EROFS);
  }
  CHECK(lock == nullptr);
  CHECK(!alignment);
  CHECK(OpenDescriptors() == before);
}

TEST_CASE("a directory that somebody puts in the place of the one just made is not ours, nor given our mode") {
  ScratchDir dir;
  PosixEnv env;
  const std::string made = dir / "d";
  const auto replaced = [&](mode_t mode, bool with_file) {
    return Answered("openat", [&, mode, with_file] {
      REQUIRE(rmdir(made.c_str()) == 0);
      REQUIRE(mkdir(made.c_str(), 0700) == 0);
      REQUIRE(chmod(made.c_str(), mode) == 0);
      if (with_file) REQUIRE_OK(env.WriteFile(made + "/theirs", "x", 0600));
    });
  };
  {
    const auto meanwhile = replaced(0755, true);
    const Status status = env.MakeDir(made, 0700);
    CHECK_ERRNO(status, ESTALE);
    CHECK(status.message().find("another one is there already") != std::string::npos);
  }
  CHECK(ModeOf(made) == 0755);
  CHECK(Names(made) == std::vector<std::string>{"theirs"});
  REQUIRE_OK(env.Unlink(made + "/theirs"));
  // Whether it is empty can't be told: then it is not ours either.
  for (const char* call : {"openat", "fdopendir", "readdir"}) {
    REQUIRE_OK(env.RemoveDir(made));
    const auto meanwhile = replaced(0755, false);
    const Answered unknown(call, EMFILE);
    CHECK_ERRNO(env.MakeDir(made, 0700), ESTALE);
    CHECK(ModeOf(made) == 0755);
  }
  // An empty one loses nothing by our mode: a file system that gives more rights than it was asked for looks so.
  REQUIRE_OK(env.RemoveDir(made));
  {
    const auto meanwhile = replaced(0755, false);
    REQUIRE_OK(env.MakeDir(made, 0700));
  }
  CHECK(ModeOf(made) == 0700);
  REQUIRE_OK(env.RemoveDir(made));
  {
    const Answered gone("openat", [&] { REQUIRE(rmdir(made.c_str()) == 0); });
    CHECK_ERRNO(env.MakeDir(made, 0700), ENOENT);
  }
  {
    const Answered unknown("fstat", EIO);
    CHECK_ERRNO(env.MakeDir(made, 0700), EIO);
  }
}

TEST_CASE("what becomes something else after it was looked at is neither opened nor waited for") {
  ScratchDir dir;
  PosixEnv env;
  const std::string path = dir / "f";
  const auto pipe_instead = [&] {
    REQUIRE(unlink(path.c_str()) == 0);
    REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  };
  std::unique_ptr<ReadableFile> in;
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<FileLock> lock;
  REQUIRE_OK(env.WriteFile(path, "x", 0600));
  {
    const Answered meanwhile("openat", pipe_instead);
    CHECK_ERRNO(env.NewReadableFile(path, false, &in), EINVAL);
  }
  REQUIRE(unlink(path.c_str()) == 0);
  REQUIRE_OK(env.WriteFile(path, "x", 0600));
  {
    const Answered meanwhile("renameat2", pipe_instead);
    CHECK_ERRNO(env.ReuseFile(path, dir / "g", 0600, false, &out), EINVAL);
  }
  REQUIRE_OK(env.WriteFile(path, "x", 0600));
  {
    const Answered meanwhile("openat", [&] { REQUIRE(unlink(path.c_str()) == 0); });
    CHECK_ERRNO(env.Hold(path, false, &lock), ENOENT);
  }
  CHECK(in == nullptr);
  CHECK(out == nullptr);
  CHECK(lock == nullptr);
}

TEST_CASE("a spare is refused with the reason, and never taken over in doubt") {
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<WritableFile> file;
  const auto reuse = [&] {
    REQUIRE_OK(env.WriteFile(dir / "old", "old", 0600));
    const Status status = env.ReuseFile(dir / "old", dir / "new", 0600, false, &file);
    if (::access((dir / "old").c_str(), F_OK) == 0) REQUIRE_OK(env.Unlink(dir / "old"));
    if (::access((dir / "new").c_str(), F_OK) == 0) REQUIRE_OK(env.Unlink(dir / "new"));
    return status;
  };
  struct Case {
    const char* call;
    int error;
    int expected;
  };
  for (const Case& each : {Case{"renameat2", EINVAL, EOPNOTSUPP}, Case{"renameat2", ENOSYS, EOPNOTSUPP},
                           Case{"renameat2", EXDEV, EXDEV}, Case{"F_SETLEASE", EINVAL, EOPNOTSUPP},
                           Case{"F_SETLEASE", ENOSYS, EOPNOTSUPP}, Case{"F_SETLEASE", ENOLCK, EOPNOTSUPP},
                           Case{"F_SETLEASE", EACCES, EACCES}, Case{"F_SETLEASE", EAGAIN, EBUSY},
                           Case{"F_SETFL", EIO, EIO}}) {
    CAPTURE(each.call);
    CAPTURE(each.error);
    const Answered answered(each.call, each.error);
    CHECK_ERRNO(reuse(), each.expected);
  }
  {
    const Answered not_given_back("F_SETLEASE", EIO, 1, 1);
    CHECK_ERRNO(reuse(), EIO);
  }
  for (const auto& [error, expected] : {std::pair{EWOULDBLOCK, EBUSY}, std::pair{EMFILE, EMFILE}}) {
    const Answered answered("openat", error, 1, 1);  // the first makes the spare
    CHECK_ERRNO(reuse(), expected);
  }
  {
    const Answered answered("fstat", EIO);
    CHECK_ERRNO(reuse(), EIO);
  }
  {
    const Answered answered("fchmod", EPERM, 1, 1);
    CHECK_ERRNO(reuse(), EPERM);
  }
  CHECK(file == nullptr);
  REQUIRE_OK(reuse());
  CHECK(file != nullptr);
}

TEST_CASE("without a way to lease in silence nothing is leased, and with one there is no need of a second thread") {
  ScratchDir dir;
  PosixEnv env;
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.WriteFile(dir / "old", "old", 0600));
  {
    std::promise<void> over;
    std::thread other([&] { over.get_future().wait(); });
    const Answered refused("F_SETOWN_EX", EINVAL, 2);
    const Status status = env.ReuseFile(dir / "old", dir / "new", 0600, false, &file);
    CHECK_ERRNO(status, EOPNOTSUPP);
    CHECK(status.message().find("lease without a signal") != std::string::npos);
    CHECK(refused.times() == 2);
    over.set_value();
    other.join();
  }
  {
    const Answered unseen("opendir", ENOENT);  // /proc is not there
    const NoThreads none;
    CHECK_ERRNO(env.ReuseFile(dir / "new", dir / "newer", 0600, false, &file), EOPNOTSUPP);
  }
  CHECK(file == nullptr);
  {
    const Answered unseen("opendir", ENOENT);
    REQUIRE_OK(env.ReuseFile(dir / "newer", dir / "newest", 0600, false, &file));
  }
}

TEST_CASE("direct I/O is taken only as far as the file system says what it demands, and that it can be met") {
  ScratchDir dir;
  PosixEnv env;
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
  if (!alignment) {
    MESSAGE("SKIP: no direct I/O in " << dir.path());
    return;
  }
  const auto said = [](uint32_t memory, uint32_t offset) { return static_cast<int>(offset << 16 | memory); };
  {
    const Answered answered("statx", said(512, 4096));
    REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
    REQUIRE(alignment);
    CHECK(alignment->memory == 512);
    CHECK(alignment->offset == 4096);
  }
  // More than blocks are aligned to, or "not for this file".
  for (const int answer : {said(8192, 512), said(512, 8192), said(0, 512), said(512, 0)}) {
    const Answered answered("statx", answer, 2);
    REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
    CHECK(!alignment);
    auto file = NewFile(&env, dir / std::to_string(answer), true);
    CHECK(!file->direct());
    CHECK(file->alignment().memory == 1);
    REQUIRE_OK(file->Pwrite("plain", 5, 3));
  }
  {
    const Answered answered("statx", ENOSYS);  // an old kernel: the most that any demands
    REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
    REQUIRE(alignment);
    CHECK(alignment->memory == kAlign);
    CHECK(alignment->offset == kAlign);
  }
  for (const char* call : {"F_GETFL", "F_SETFL"}) {
    const Answered answered(call, EINVAL);
    REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
    CHECK(!alignment);
  }
}

}  // namespace layerwise
