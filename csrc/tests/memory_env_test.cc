// SPDX-License-Identifier: Apache-2.0
#include "memory_env.h"

#include <cerrno>

#include "layerwise/aligned_buffer.h"
#include "scratch.h"

namespace layerwise {

TEST_CASE("a memory file system refuses what a real one refuses") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<ReadableFile> in;
  REQUIRE_OK(env.MakeDir("/d", 0700));
  REQUIRE_OK(env.WriteFile("/d/f", "x", 0600));
  CHECK_ERRNO(env.MakeDir("/d", 0700), EEXIST);
  CHECK_ERRNO(env.MakeDir("/no/d", 0700), ENOENT);
  CHECK_ERRNO(env.MakeDir("/d/f/g", 0700), ENOTDIR);
  CHECK_ERRNO(env.MakeDir("/d/../e", 0700), EINVAL);
  CHECK_ERRNO(env.NewWritableFile("/d/f", 0600, false, &out), EEXIST);
  CHECK_ERRNO(env.NewReadableFile("/d", false, &in), EISDIR);
  CHECK_ERRNO(env.NewReadableFile("/d/no", false, &in), ENOENT);
  CHECK_ERRNO(env.Unlink("/d"), EISDIR);
  CHECK_ERRNO(env.RemoveDir("/d"), ENOTEMPTY);
  CHECK_ERRNO(env.RemoveDir("/d/f"), ENOTDIR);
  CHECK_ERRNO(env.Rename("/no", "/x"), ENOENT);
  CHECK_ERRNO(env.Rename("/d", "/d/e"), EINVAL);
  CHECK_ERRNO(env.Rename("/d/f", "/d"), EISDIR);
  std::string data;
  CHECK_ERRNO(env.ReadFile("/d/f", 0, &data), EFBIG);
  REQUIRE_OK(env.ReadFile("//d/./f", 1, &data));
  CHECK(data == "x");
}

TEST_CASE("a memory file system refuses what has no directory, the root's own removal and what is closed") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<ReadableFile> in;
  std::unique_ptr<FileLock> lock;
  FileInfo info;
  std::vector<std::string> names = {"old"};
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.MakeDir("/d", 0700));
  REQUIRE_OK(env.MakeDir("/d/e", 0700));
  REQUIRE_OK(env.MakeDir("/empty", 0700));
  REQUIRE_OK(env.WriteFile("/f", "x", 0600));
  CHECK_ERRNO(env.RemoveDir("/"), EBUSY);
  CHECK_ERRNO(env.ListDir("/no", &names), ENOENT);
  CHECK(names.empty());
  CHECK_ERRNO(env.ListDir("/f", &names), ENOTDIR);
  CHECK_ERRNO(env.SyncDir("/no"), ENOENT);
  CHECK_ERRNO(env.Stat("/f/g", &info), ENOTDIR);
  CHECK_ERRNO(env.Lock("/d", 0600, &lock), EISDIR);
  CHECK_ERRNO(env.Lock("/no/l", 0600, &lock), ENOENT);
  CHECK_ERRNO(env.DirectIo("/no", &alignment), ENOENT);
  CHECK_ERRNO(env.Hold("/f", true, &lock), EOPNOTSUPP);
  CHECK_ERRNO(env.Rename("/", "/x"), EBUSY);
  CHECK_ERRNO(env.Rename("/f", "/"), EBUSY);
  CHECK_ERRNO(env.Rename("/empty", "/f"), ENOTDIR);
  CHECK_ERRNO(env.Rename("/empty", "/d"), ENOTEMPTY);
  CHECK_ERRNO(env.ReuseFile("/empty", "/moved", 0600, false, &out), EISDIR);
  REQUIRE_OK(env.Rename("/f", "/f"));
  env.Confine("/d");  // there are no links: nothing leads out of it
  env.LetGo();
  REQUIRE_OK(env.Rename("/moved", "/d/e"));  // over an empty directory
  REQUIRE_OK(env.Rename("/d/e", "/back"));
  REQUIRE_OK(env.Stat("/back", &info));
  CHECK(info.kind == FileKind::kDirectory);
  REQUIRE_OK(env.NewWritableFile("/g", 0600, false, &out));
  REQUIRE_OK(out->Close());
  REQUIRE_OK(out->Close());
  CHECK_ERRNO(out->Allocate(1), EBADF);
  CHECK_ERRNO(out->Truncate(1), EBADF);
  CHECK_ERRNO(out->Sync(), EBADF);
  REQUIRE_OK(env.NewReadableFile("/f", false, &in));
  REQUIRE_OK(in->Close());
  REQUIRE_OK(in->Close());
  char byte = 0;
  size_t got = 1;
  CHECK_ERRNO(in->Pread(&byte, 1, 0, &got), EBADF);
  CHECK(got == 0);
  REQUIRE_OK(env.MakeDir("/locks", 0700));
  REQUIRE_OK(env.Lock("/locks/l", 0600, &lock));
  std::string data = "old";
  REQUIRE_OK(lock->Read(0, &data));
  CHECK(data.empty());
  REQUIRE_OK(env.Rename("/locks", "/elsewhere"));
  bool mine = true;
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(!mine);
  REQUIRE_OK(env.WriteFile("/locks", "x", 0600));
  REQUIRE_OK(lock->HeldPathIsMine(&mine));
  CHECK(!mine);
  REQUIRE_OK(lock->Release());
  REQUIRE_OK(lock->Release());
  CHECK_ERRNO(lock->Read(1, &data), EBADF);
  CHECK_ERRNO(lock->Write("x"), EBADF);
}

TEST_CASE("an open file survives its name") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile("/a", 0600, false, &file));
  REQUIRE_OK(env.Rename("/a", "/b"));
  REQUIRE_OK(file->Pwrite("x", 1, 0));
  std::string data;
  REQUIRE_OK(env.ReadFile("/b", 1, &data));
  CHECK(data == "x");
  REQUIRE_OK(env.Unlink("/b"));
  REQUIRE_OK(file->Pwrite("y", 1, 0));
  REQUIRE_OK(file->Close());
  CHECK_ERRNO(file->Pwrite("y", 1, 0), EBADF);
}

TEST_CASE("direct files demand alignment") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> out;
  REQUIRE_OK(env.NewWritableFile("/f", 0600, true, &out));
  CHECK(out->direct());
  AlignedBuffer buffer;
  REQUIRE_OK(buffer.Reserve(4096));
  std::fill_n(buffer.data(), 4096, 'x');
  CHECK_ERRNO(out->Pwrite(buffer.data() + 1, 512, 0), EINVAL);
  CHECK_ERRNO(out->Pwrite(buffer.data(), 511, 0), EINVAL);
  CHECK_ERRNO(out->Pwrite(buffer.data(), 512, 1), EINVAL);
  REQUIRE_OK(out->Pwrite(buffer.data() + 512, 512, 512));
  std::unique_ptr<ReadableFile> in;
  REQUIRE_OK(env.NewReadableFile("/f", true, &in));
  size_t got = 0;
  CHECK_ERRNO(in->Pread(buffer.data(), 512, 1, &got), EINVAL);
  REQUIRE_OK(in->Pread(buffer.data(), 4096, 0, &got));
  CHECK(got == 1024);
  std::optional<DirectIoAlignment> alignment;
  REQUIRE_OK(env.DirectIo("/", &alignment));
  CHECK(alignment->memory == 512);
}

TEST_CASE("locks exclude each other, and only their own write is durable") {
  MemoryEnv env;
  std::unique_ptr<FileLock> first, second;
  REQUIRE_OK(env.Lock("/l", 0600, &first));
  REQUIRE_OK(env.SyncDir("/"));
  CHECK_ERRNO(env.Lock("/l", 0600, &second), EAGAIN);
  REQUIRE_OK(first->Write("long content"));
  REQUIRE_OK(first->Write("short"));
  std::string data;
  REQUIRE_OK(env.ReadFile("/l", 100, &data));
  CHECK(data == "short");
  auto after = env.Crash(env.LogSize(), 0, CrashPolicy::kNone);
  REQUIRE_OK(after->ReadFile("/l", 100, &data));
  CHECK(data == "short");
  std::unique_ptr<FileLock> there;
  CHECK(after->Lock("/l", 0600, &there).ok());
  bool mine = false;
  REQUIRE_OK(first->HeldPathIsMine(&mine));
  CHECK(mine);
  REQUIRE_OK(env.Unlink("/l"));
  REQUIRE_OK(first->HeldPathIsMine(&mine));
  CHECK(!mine);
  first.reset();
  CHECK(env.Lock("/l", 0600, &second).ok());
}

TEST_CASE("dropped operations are acknowledged and do nothing") {
  MemoryEnv env;
  REQUIRE_OK(env.MakeDir("/d", 0700));
  REQUIRE_OK(env.SyncDir("/"));
  REQUIRE_OK(env.Drop("sync_dir", "/d"));
  REQUIRE_OK(env.Drop("sync", "*.partial"));
  REQUIRE_OK(env.Drop("rename", "*/final"));
  REQUIRE_OK(env.Drop("write", "*/silent"));
  CHECK(!env.Drop("unlink", "*").ok());
  REQUIRE_OK(env.WriteFile("/d/a.partial", "x", 0600));
  REQUIRE_OK(env.WriteFile("/d/silent", "x", 0600));
  REQUIRE_OK(env.Rename("/d/a.partial", "/d/final"));
  REQUIRE_OK(env.SyncDir("/d"));
  CHECK(env.dropped() == 4);
  std::vector<std::string> names;
  REQUIRE_OK(env.ListDir("/d", &names));
  CHECK(names == std::vector<std::string>{"a.partial", "silent"});
  FileInfo info;
  REQUIRE_OK(env.Stat("/d/silent", &info));
  CHECK(info.size == 0);
  auto after = env.Crash(env.LogSize(), 0, CrashPolicy::kNone);
  REQUIRE_OK(after->ListDir("/d", &names));
  CHECK(names.empty());
  std::string data;
  auto named = env.Crash(env.LogSize(), 0, CrashPolicy::kNames);
  REQUIRE_OK(named->ReadFile("/d/a.partial", 1, &data));
  CHECK(data == "");
}

TEST_CASE("a fingerprint says whether two of them hold the same") {
  MemoryEnv one, other;
  CHECK(one.Fingerprint() == other.Fingerprint());
  REQUIRE_OK(one.WriteFile("/a", "x", 0600));
  REQUIRE_OK(one.MakeDir("/d", 0700));
  REQUIRE_OK(other.MakeDir("/d", 0700));
  CHECK(one.Fingerprint() != other.Fingerprint());
  REQUIRE_OK(other.WriteFile("/b", "x", 0600));
  CHECK(one.Fingerprint() != other.Fingerprint());
  REQUIRE_OK(other.Rename("/b", "/a"));
  CHECK(one.Fingerprint() == other.Fingerprint());
  REQUIRE_OK(other.Rename("/a", "/d/a"));
  CHECK(one.Fingerprint() != other.Fingerprint());
  REQUIRE_OK(other.Rename("/d/a", "/a"));
  REQUIRE_OK(other.Unlink("/a"));
  REQUIRE_OK(other.WriteFile("/a", "y", 0600));
  CHECK(one.Fingerprint() != other.Fingerprint());
  REQUIRE_OK(other.Unlink("/a"));
  REQUIRE_OK(other.MakeDir("/a", 0700));
  CHECK(one.Fingerprint() != other.Fingerprint());
}

TEST_CASE("a retired file is reused only while nobody else has it") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> file;
  std::unique_ptr<ReadableFile> reader;
  REQUIRE_OK(env.WriteFile("/a", "old content", 0600));
  REQUIRE_OK(env.WriteFile("/b", "x", 0600));
  CHECK_ERRNO(env.ReuseFile("/a", "/b", 0600, false, &file), EEXIST);
  CHECK_ERRNO(env.ReuseFile("/no", "/c", 0600, false, &file), ENOENT);
  CHECK_ERRNO(env.ReuseFile("/", "/c", 0600, false, &file), EBUSY);
  REQUIRE_OK(env.NewReadableFile("/a", false, &reader));
  CHECK_ERRNO(env.ReuseFile("/a", "/c", 0600, false, &file), EBUSY);
  REQUIRE_OK(reader->Close());
  REQUIRE_OK(env.ReuseFile("/c", "/d", 0600, false, &file));
  std::unique_ptr<WritableFile> second;
  CHECK_ERRNO(env.ReuseFile("/d", "/e", 0600, false, &second), EBUSY);
  REQUIRE_OK(file->Pwrite("new", 3, 0));
  std::string data;
  REQUIRE_OK(env.ReadFile("/e", 100, &data));
  CHECK(data == "new content");
  REQUIRE_OK(file->Truncate(3));
  REQUIRE_OK(env.ReadFile("/e", 100, &data));
  CHECK(data == "new");
  file.reset();
  CHECK(env.ReuseFile("/e", "/f", 0600, true, &second).ok());
  CHECK(second->direct());
  CHECK(env.LogEntry(env.LogSize() - 1) == "rename /e -> /f");
}

}  // namespace layerwise
