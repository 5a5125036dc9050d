// SPDX-License-Identifier: Apache-2.0
#include "layerwise/nvm_env.h"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <thread>
#include <utility>

#include "answers.h"
#include "scratch.h"

// What only NvmEnv does. With LAYERWISE_TEST_BACKEND=nvm (tests/vm) the tests of
// posix_env_test.cc and the shards' run on it too.

namespace layerwise {

namespace {

// Writing needs DAX: where the tests are told that there is some (tests/vm/run.sh), they use it. Elsewhere files are
// mapped without MAP_SYNC, which shows all but what a power loss leaves.
class Dax {
 public:
  Dax() {
    if (!OnNvm()) without_.emplace();
  }

 private:
  std::optional<AsOnDax> without_;
};

std::unique_ptr<WritableFile> NewFile(NvmEnv* env, const std::string& path) {
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env->NewWritableFile(path, 0600, true, &file));
  return file;
}

std::string Content(Env* env, const std::string& path) {
  std::string data;
  REQUIRE_OK(env->ReadFile(path, 1 << 30, &data));
  return data;
}

}  // namespace

TEST_CASE("a machine said to have DAX maps files with MAP_SYNC") {
  if (!OnNvm()) return;
  ScratchDir dir;
  NvmEnv env;
  REQUIRE_OK(env.Probe(dir.path()));
  auto file = NewFile(&env, dir / "f");
  CHECK(file->direct());
  CHECK(file->alignment().memory == 1);
  CHECK(file->alignment().offset == 1);
}

TEST_CASE("without DAX the error says so, and no plain file takes its place") {
  if (OnNvm()) return;
  ScratchDir dir;
  NvmEnv env;
  const Status probed = env.Probe(dir.path());
  CHECK_ERRNO(probed, EOPNOTSUPP);
  CHECK(probed.message().find("no DAX here") != std::string::npos);
  CHECK(probed.path() == dir.path());
  std::optional<DirectIoAlignment> alignment;
  CHECK_ERRNO(env.DirectIo(dir.path(), &alignment), EOPNOTSUPP);
  std::unique_ptr<WritableFile> file;
  CHECK_ERRNO(env.NewWritableFile(dir / "f", 0600, true, &file), EOPNOTSUPP);
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir(dir.path(), &names));
  CHECK(names.empty());
  REQUIRE_OK(env.WriteFile(dir / "old", "x", 0600));
  CHECK_ERRNO(env.ReuseFile(dir / "old", dir / "new", 0600, true, &file), EOPNOTSUPP);
  CHECK(env.Unlink(dir / "new").ok());
  CHECK(file == nullptr);
}

TEST_CASE("a probe of a directory that is not there says that") {
  ScratchDir dir;
  NvmEnv env;
  CHECK_ERRNO(env.Probe(dir / "missing"), ENOENT);
}

TEST_CASE("mapped bytes land where they belong, whatever their alignment") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  for (size_t shift : {0, 1, 15, 63}) {
    for (size_t n : {0, 1, 63, 64, 65, 200, 4097}) {
      const std::string path = dir / (std::to_string(shift) + "-" + std::to_string(n));
      auto file = NewFile(&env, path);
      const std::string ground = Pattern(8192, 3), data = Pattern(n + shift, 5);
      REQUIRE_OK(file->Pwrite(ground.data(), ground.size(), 0));
      REQUIRE_OK(file->Pwrite(data.data() + shift, n, 1000 + shift));
      REQUIRE_OK(file->Sync());
      REQUIRE_OK(file->Close());
      std::string expected = ground;
      expected.replace(1000 + shift, n, data.substr(shift));
      CHECK(Content(&env, path) == expected);
    }
  }
}

TEST_CASE("threads that write neighboring bytes do not disturb each other") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  auto file = NewFile(&env, dir / "f");
  const std::string data = Pattern(1 << 20);
  std::vector<std::thread> threads;
  std::vector<Status> statuses(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t * 101; i < data.size() && statuses[t].ok(); i += 404) {
        statuses[t] = file->Pwrite(data.data() + i, std::min<size_t>(101, data.size() - i), i);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Status& status : statuses) REQUIRE_OK(status);
  REQUIRE_OK(file->Sync());
  CHECK(Content(&env, dir / "f") == data);
}

TEST_CASE("a write past the mapping extends file and mapping, and the gap reads as zeros") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  auto file = NewFile(&env, dir / "f");
  const uint64_t segment = 64 << 20;
  const std::string data = Pattern(10000);
  REQUIRE_OK(file->Pwrite("x", 1, 0));
  REQUIRE_OK(file->Pwrite(data.data(), data.size(), segment - 5000));
  REQUIRE_OK(file->Sync());
  FileInfo info;
  REQUIRE_OK(env.Stat(dir / "f", &info));
  CHECK(info.size == segment + 5000);
  const std::string content = Content(&env, dir / "f");
  CHECK(content.substr(segment - 5000) == data);
  CHECK(content.substr(0, 3) == std::string("x\0\0", 3));
  CHECK(content.find_first_not_of('\0', 1) >= segment - 5000);
}

TEST_CASE("a file system without room is an error and not the death of the process") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  auto file = NewFile(&env, dir / "f");
  {
    std::optional<Answered> full;
    if (!OnNvm()) full.emplace("fallocate", ENOSPC, 2);  // the disk of this machine is not to be filled
    CHECK_ERRNO(file->Allocate(uint64_t{1} << 40), ENOSPC);
    CHECK_ERRNO(file->Pwrite("x", 1, uint64_t{1} << 40), ENOSPC);
  }
  CHECK_ERRNO(file->Allocate(UINT64_MAX), EFBIG);
  CHECK_ERRNO(file->Pwrite("x", 1, INT64_MAX), EFBIG);
  REQUIRE_OK(file->Truncate(0));
  REQUIRE_OK(file->Pwrite("y", 1, 0));
  CHECK(Content(&env, dir / "f") == "y");
}

TEST_CASE("a mapped file that is cut takes writes past its new end, and reuse keeps its space") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  const std::string old = Pattern(100000);
  REQUIRE_OK(env.WriteFile(dir / "old", old, 0600));
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.ReuseFile(dir / "old", dir / "new", 0600, true, &file));
  REQUIRE_OK(file->Pwrite("fresh", 5, 10));
  CHECK(Content(&env, dir / "new") == old.substr(0, 10) + "fresh" + old.substr(15));
  REQUIRE_OK(file->Truncate(20));
  REQUIRE_OK(file->Pwrite("z", 1, 5000));
  REQUIRE_OK(file->Sync());
  CHECK(Content(&env, dir / "new") == old.substr(0, 10) + "fresh" + old.substr(15, 5) + std::string(4980, '\0') + "z");
  std::unique_ptr<WritableFile> second;
  CHECK_ERRNO(env.ReuseFile(dir / "new", dir / "newer", 0600, true, &second), EBUSY);
  REQUIRE_OK(file->Close());
  CHECK(env.ReuseFile(dir / "newer", dir / "newest", 0600, true, &second).ok());
}

TEST_CASE("a file is mapped or not there, and the error says which of both it is: no DAX, or a failure") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  std::unique_ptr<WritableFile> file;
  for (const auto& [error, expected] : {std::pair{EOPNOTSUPP, EOPNOTSUPP}, std::pair{EINVAL, EOPNOTSUPP},
                                        std::pair{ENODEV, EOPNOTSUPP}, std::pair{ENOMEM, ENOMEM}}) {
    const Answered refused("mmap", error);
    const Status status = env.NewWritableFile(dir / "f", 0600, true, &file);
    CHECK_ERRNO(status, expected);
    CHECK((status.message().find("no DAX here") != std::string::npos) == (expected == EOPNOTSUPP));
  }
  CHECK(file == nullptr);
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir(dir.path(), &names));
  CHECK(names.empty());
  CHECK_ERRNO(env.NewWritableFile(dir / "no/f", 0600, true, &file), ENOENT);
  CHECK_ERRNO(env.ReuseFile(dir / "no", dir / "f", 0600, true, &file), ENOENT);
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
  REQUIRE(alignment);
  CHECK(alignment->memory == 1);
  CHECK(alignment->offset == 1);
  // What is not direct is a plain file, and reused as one.
  REQUIRE_OK(env.WriteFile(dir / "old", "old", 0600));
  REQUIRE_OK(env.ReuseFile(dir / "old", dir / "new", 0600, false, &file));
  CHECK(!file->direct());
}

TEST_CASE("a mapped file is gone on with where it can be, and fails for good where a flush has failed") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  auto file = NewFile(&env, dir / "f");
  CHECK(file->direct());
  CHECK(file->alignment().memory == 1);
  CHECK(file->alignment().offset == 1);
  {
    const Answered interrupted("fallocate", EINTR);
    REQUIRE_OK(file->Pwrite("hello", 5, 0));
  }
  {
    const Answered unmapped("mmap", ENOMEM);  // past the first segment
    CHECK_ERRNO(file->Allocate(100 << 20), ENOMEM);
  }
  {
    const Answered failed("ftruncate", EIO);
    CHECK_ERRNO(file->Truncate(3), EIO);
  }
  REQUIRE_OK(file->Truncate(5));
  {
    const Answered failed("fdatasync", EIO);
    CHECK_ERRNO(file->Sync(), EIO);
  }
  const Status again = file->Sync();
  CHECK_ERRNO(again, EIO);
  CHECK(again.message().find("after a failed one") != std::string::npos);
  CHECK(Content(&env, dir / "f") == "hello");
  REQUIRE_OK(file->Close());
  REQUIRE_OK(file->Close());
  CHECK_ERRNO(file->Pwrite("x", 1, 0), EBADF);
  CHECK_ERRNO(file->Allocate(1), EBADF);
}

TEST_CASE("a forked child destroys a mapped file without unmapping what it has at that place") {
  const Dax dax;
  ScratchDir dir;
  NvmEnv env;
  auto file = NewFile(&env, dir / "f");
  REQUIRE_OK(file->Pwrite("hello", 5, 0));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const bool refuses = file->Pwrite("child", 5, 0).error_number() == EBADF;
    file.reset();
    Leave(refuses ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  REQUIRE_OK(file->Pwrite("J", 1, 0));
  CHECK(Content(&env, dir / "f") == "Jello");
}

}  // namespace layerwise
