// SPDX-License-Identifier: Apache-2.0
#include "layerwise/posix_env.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <vector>

#include "answers.h"
#include "layerwise/aligned_buffer.h"
#include "living_child.h"
#include "scratch.h"

namespace layerwise {

TEST_CASE("modes are exact whatever the umask is") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file;
  std::unique_ptr<FileLock> lock;
  const mode_t before = umask(0777);
  const Status made = env.MakeDir(dir / "d", 0750);
  const Status created = env.NewWritableFile(dir / "f", 0640, false, &file);
  const Status locked = env.Lock(dir / "l", 0604, &lock);
  umask(before);
  REQUIRE_OK(made);
  REQUIRE_OK(created);
  REQUIRE_OK(locked);
  CHECK(ModeOf(dir / "d") == 0750);
  CHECK(ModeOf(dir / "f") == 0640);
  CHECK(ModeOf(dir / "l") == 0604);
}

TEST_CASE("nothing that exists is created again, and no link is followed") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<ReadableFile> in;
  std::unique_ptr<FileLock> lock;
  REQUIRE_OK(env.WriteFile(dir / "f", "x", 0600));
  REQUIRE(symlink("f", (dir / "link").c_str()) == 0);
  REQUIRE(symlink("nowhere", (dir / "dangling").c_str()) == 0);
  CHECK_ERRNO(env.NewWritableFile(dir / "f", 0600, false, &out), EEXIST);
  CHECK_ERRNO(env.NewWritableFile(dir / "dangling", 0600, false, &out), EEXIST);
  CHECK_ERRNO(env.MakeDir(dir / "f", 0700), EEXIST);
  CHECK_ERRNO(env.NewReadableFile(dir / "link", false, &in), ELOOP);
  CHECK_ERRNO(env.Lock(dir / "link", 0600, &lock), ELOOP);
  CHECK_ERRNO(env.NewReadableFile(dir.path(), false, &in), EISDIR);
  CHECK_ERRNO(env.NewReadableFile(dir / "missing", false, &in), ENOENT);
  REQUIRE(mkfifo((dir / "pipe").c_str(), 0600) == 0);
  CHECK_ERRNO(env.NewReadableFile(dir / "pipe", false, &in), EINVAL);
  CHECK_ERRNO(env.Lock(dir / "pipe", 0600, &lock), EINVAL);
}

TEST_CASE("files are written, read, listed, renamed and removed") {
  ScratchDir dir;
  Env& env = DiskEnv();
  REQUIRE_OK(env.MakeDir(dir / "d", 0700));
  REQUIRE_OK(env.WriteFile(dir / "d/b", "hello", 0600));
  REQUIRE_OK(env.WriteFile(dir / "d/a", "", 0600));
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir(dir / "d", &names));
  CHECK(names == std::vector<std::string>{"a", "b"});
  std::string data;
  REQUIRE_OK(env.ReadFile(dir / "d/b", 5, &data));
  CHECK(data == "hello");
  CHECK_ERRNO(env.ReadFile(dir / "d/b", 4, &data), EFBIG);
  REQUIRE_OK(env.Rename(dir / "d/b", dir / "d/a"));
  REQUIRE_OK(env.SyncDir(dir / "d"));
  CHECK_ERRNO(env.SyncDir(dir / "d/a"), ENOTDIR);
  FileInfo info;
  REQUIRE_OK(env.Stat(dir / "d/a", &info));
  CHECK(info.kind == FileKind::kFile);
  CHECK(info.size == 5);
  CHECK_ERRNO(env.Stat(dir / "d/b", &info), ENOENT);
  CHECK_ERRNO(env.RemoveDir(dir / "d"), ENOTEMPTY);
  REQUIRE_OK(env.Unlink(dir / "d/a"));
  REQUIRE_OK(env.RemoveDir(dir / "d"));
  const Status status = env.Rename(dir / "x", dir / "y");
  CHECK(status.path() == dir / "x");
  CHECK(status.message().find(dir / "y") != std::string::npos);
}

TEST_CASE("a read is short only at the end of the file") {
  ScratchDir dir;
  Env& env = DiskEnv();
  const std::string content = Pattern(10000);
  REQUIRE_OK(env.WriteFile(dir / "f", content, 0600));
  for (bool direct : {false, true}) {
    std::unique_ptr<ReadableFile> file;
    REQUIRE_OK(env.NewReadableFile(dir / "f", direct, &file));
    CHECK(file->size() == 10000);
    AlignedBuffer buffer;
    REQUIRE_OK(buffer.Reserve(16384));
    size_t got = 0;
    REQUIRE_OK(file->Pread(buffer.data(), 4096, 4096, &got));
    CHECK(std::string(buffer.data(), got) == content.substr(4096, 4096));
    REQUIRE_OK(file->Pread(buffer.data(), 16384, 0, &got));
    CHECK(std::string(buffer.data(), got) == content);
    REQUIRE_OK(file->Pread(buffer.data(), 4096, 12288, &got));
    CHECK(got == 0);
  }
}

TEST_CASE("a short write is continued, and ends with the kernel's own error") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile(dir / "f", 0600, false, &file));
  rlimit before;
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit small = {6000, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string data = Pattern(10000);
  const Status status = file->Pwrite(data.data(), data.size(), 0);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  CHECK_ERRNO(status, EFBIG);
  std::string content;
  REQUIRE_OK(env.ReadFile(dir / "f", 10000, &content));
  CHECK(content == data.substr(0, 6000));
}

TEST_CASE("a file allocates, and a closed one refuses") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile(dir / "f", 0600, true, &file));
  REQUIRE_OK(file->Allocate(0));
  REQUIRE_OK(file->Allocate(8192));
  FileInfo info;
  REQUIRE_OK(env.Stat(dir / "f", &info));
  CHECK(info.size == 8192);
  REQUIRE_OK(file->Close());
  REQUIRE_OK(file->Close());
  CHECK_ERRNO(file->Pwrite("x", 1, 0), EBADF);
  CHECK_ERRNO(file->Sync(), EBADF);
  CHECK_ERRNO(file->Sync(), EIO);  // not asked again
}

TEST_CASE("direct I/O says what it demands, and the probe leaves nothing") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir(dir.path(), &names));
  CHECK(names.empty());
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile(dir / "f", 0600, true, &file));
  CHECK(file->direct() == alignment.has_value());
  if (alignment) {
    CHECK(file->alignment().memory == alignment->memory);
    CHECK(file->alignment().offset == alignment->offset);
    CHECK(kAlign % alignment->memory == 0);
  }
  CHECK_ERRNO(env.DirectIo(dir / "missing", &alignment), ENOENT);
}

TEST_CASE("the file system demands the alignment that these tests were sent here for") {
  const char* const expected = std::getenv("LAYERWISE_TEST_ALIGN");
  if (expected == nullptr) return;
  ScratchDir dir;
  PosixEnv env;
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo(dir.path(), &alignment));
  REQUIRE(alignment.has_value());
  CHECK(std::to_string(alignment->offset) == expected);
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile(dir / "f", 0600, true, &file));
  AlignedBuffer buffer;
  REQUIRE_OK(buffer.Reserve(8192));
  std::fill_n(buffer.data(), 8192, 'x');
  CHECK_ERRNO(file->Pwrite(buffer.data(), alignment->offset / 2, 0), EINVAL);
  CHECK_ERRNO(file->Pwrite(buffer.data(), alignment->offset, alignment->offset / 2), EINVAL);
  CHECK(file->Pwrite(buffer.data(), alignment->offset, alignment->offset).ok());
}

TEST_CASE("one lock excludes another, in this process and in others") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<FileLock> first, second;
  REQUIRE_OK(env.Lock(dir / "l", 0600, &first));
  CHECK_ERRNO(env.Lock(dir / "l", 0600, &second), EAGAIN);
  bool mine = false;
  REQUIRE_OK(first->HeldPathIsMine(&mine));
  CHECK(mine);
  REQUIRE_OK(first->Write("session one"));
  REQUIRE_OK(first->Write("two"));
  std::string data;
  REQUIRE_OK(first->Read(100, &data));
  CHECK(data == "two");
  CHECK_ERRNO(first->Read(2, &data), EFBIG);
  REQUIRE_OK(first->Release());
  REQUIRE_OK(first->Release());
  CHECK_ERRNO(first->Write("x"), EBADF);
  REQUIRE_OK(first->HeldPathIsMine(&mine));
  CHECK(!mine);
  REQUIRE_OK(env.Lock(dir / "l", 0600, &second));
  REQUIRE_OK(second->Read(100, &data));
  CHECK(data == "two");
  REQUIRE_OK(env.Unlink(dir / "l"));
  REQUIRE_OK(second->HeldPathIsMine(&mine));
  CHECK(!mine);
}

TEST_CASE("a forked child that lives on does not keep the lock") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<FileLock> lock, next;
  REQUIRE_OK(env.Lock(dir / "l", 0600, &lock));
  LivingChild child([] { return true; });
  REQUIRE_OK(lock->Release());
  CHECK(env.Lock(dir / "l", 0600, &next).ok());
  child.End();
}

TEST_CASE("a forked child keeps no file open, and destroying one there closes nothing of its own") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<ReadableFile> in;
  REQUIRE_OK(env.WriteFile(dir / "in", "in", 0600));
  REQUIRE_OK(env.NewWritableFile(dir / "out", 0600, false, &out));
  REQUIRE_OK(env.NewReadableFile(dir / "in", false, &in));
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int kept = 0, lost = 0;
    std::vector<int> own;
    for (int fd = 3; fd < 256; ++fd) {
      char path[4096];
      const ssize_t length = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path));
      const std::string_view target(path, length > 0 ? static_cast<size_t>(length) : 0);
      kept += target.find(dir.path()) != std::string_view::npos;
    }
    for (int i = 0; i < 8; ++i) own.push_back(open("/dev/null", O_RDONLY));  // the numbers that became free
    out.reset();
    in.reset();
    for (const int fd : own) lost += fcntl(fd, F_GETFD) < 0;
    Leave(10 * kept + lost);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  REQUIRE_OK(out->Pwrite("out", 3, 0));  // the parent's are as they were
  REQUIRE_OK(out->Close());
  char content[2];
  size_t got = 0;
  REQUIRE_OK(in->Pread(content, 2, 0, &got));
  CHECK(got == 2);
}

TEST_CASE("a file that others hold cannot be held alone, and one that was removed not at all") {
  ScratchDir dir;
  Env& env = DiskEnv();
  std::unique_ptr<FileLock> one, other, alone;
  REQUIRE_OK(env.WriteFile(dir / "f", "content", 0400));  // the right to read is enough
  REQUIRE_OK(env.Hold(dir / "f", false, &one));
  REQUIRE_OK(env.Hold(dir / "f", false, &other));
  CHECK_ERRNO(env.Hold(dir / "f", true, &alone), EAGAIN);
  std::string content;
  REQUIRE_OK(one->Read(7, &content));
  CHECK(content == "content");
  CHECK_ERRNO(one->Write("other"), EBADF);
  REQUIRE_OK(one->Release());
  CHECK_ERRNO(env.Hold(dir / "f", true, &alone), EAGAIN);
  other.reset();
  REQUIRE_OK(env.Hold(dir / "f", true, &alone));
  CHECK_ERRNO(env.Hold(dir / "f", false, &one), EAGAIN);
  REQUIRE_OK(env.Unlink(dir / "f"));
  REQUIRE_OK(alone->Release());
  CHECK_ERRNO(env.Hold(dir / "f", false, &one), ENOENT);
  REQUIRE(symlink("nowhere", (dir / "link").c_str()) == 0);
  CHECK_ERRNO(env.Hold(dir / "link", false, &one), ELOOP);
}

}  // namespace layerwise
