// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_ENV_H_
#define LAYERWISE_ENV_H_

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "layerwise/status.h"

namespace layerwise {

// What a file opened for direct I/O demands of memory addresses, and of file
// offsets and lengths, in bytes. Both are powers of two.
struct DirectIoAlignment {
  uint32_t memory = 1;
  uint32_t offset = 1;
};

enum class FileKind { kFile, kDirectory, kLink, kOther };

struct FileInfo {
  FileKind kind = FileKind::kOther;
  uint64_t size = 0;
};

// A new file, or one taken over by Env::ReuseFile, open for writing.
//
// Threads: Pwrite may be called by several threads at once. Every other call
// REQUIRES that no call on the same file is in flight.
//
// Survives a crash: bytes and size, from the return of a successful Sync. The
// file's name does not: see Env::SyncDir.
class WritableFile {
 public:
  WritableFile() = default;
  WritableFile(const WritableFile&) = delete;
  WritableFile& operator=(const WritableFile&) = delete;
  // Closes the file if it is open; an error of that is lost.
  virtual ~WritableFile() = default;

  // Whether I/O bypasses the page cache. alignment() is {1, 1} if not.
  virtual bool direct() const = 0;
  virtual DirectIoAlignment alignment() const = 0;

  // Writes all n bytes, or fails. A short write is continued; a write that makes
  // no progress is EIO. After a failure the bytes of the range are undefined.
  // REQUIRES: if direct(), data, offset and n are aligned (EINVAL otherwise).
  virtual Status Pwrite(const void* data, size_t n, uint64_t offset) = 0;

  // Writes `count` pieces one after the other, all of them, or fails as Pwrite does.
  // At most 1024 pieces. REQUIRES: each piece is one that Pwrite would take. As it
  // is here, it calls Pwrite for each.
  virtual Status Pwritev(const iovec* pieces, int count, uint64_t offset);

  // The open file, for a writer that speaks to the kernel itself, with the same
  // demands on alignment; -1 if only Pwrite may write.
  virtual int descriptor() const { return -1; }

  // Reserves space so that the file has at least `size` bytes; new ones read as
  // zeros. A file system that cannot do this is not an error.
  virtual Status Allocate(uint64_t size) = 0;

  // Makes the file exactly this long; bytes that it gains read as zeros. Durable by
  // the next Sync, like any other change: until then a crash leaves either size.
  virtual Status Truncate(uint64_t size) = 0;

  // Flushes data and size to the device. After a failure the file is poisoned:
  // the kernel may have dropped the dirty pages and forgotten the error, so
  // every later Sync is EIO without asking it again.
  virtual Status Sync() = 0;

  // Idempotent. Does not flush.
  virtual Status Close() = 0;
};

// A regular file, open for reading. Threads: as for WritableFile, with Pread.
class ReadableFile {
 public:
  ReadableFile() = default;
  ReadableFile(const ReadableFile&) = delete;
  ReadableFile& operator=(const ReadableFile&) = delete;
  virtual ~ReadableFile() = default;

  // The size in bytes when the file was opened.
  virtual uint64_t size() const = 0;
  virtual bool direct() const = 0;
  virtual DirectIoAlignment alignment() const = 0;

  // Reads up to n bytes into data and stores their number in *got, which is less
  // than n only at the end of the file.
  // REQUIRES: if direct(), data, offset and n are aligned (EINVAL otherwise).
  virtual Status Pread(void* data, size_t n, uint64_t offset, size_t* got) = 0;

  // How much of the file the page cache holds, 0 to 1, by a sample; 0 where that can't be
  // told. Reads nothing.
  virtual double Cached() { return 0; }

  virtual Status Close() = 0;
};

// A held lock on a whole file. It ends with Release, with the object, and with
// the death of the process that took it: children made by fork do not keep it.
//
// Threads: external synchronization.
class FileLock {
 public:
  FileLock() = default;
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  virtual ~FileLock() = default;

  virtual Status Release() = 0;  // idempotent

  // Replaces the content in place and flushes it. A crash in between leaves any
  // mixture of old and new content.
  // REQUIRES: not released (EBADF otherwise), here and below.
  virtual Status Write(std::string_view data) = 0;

  // EFBIG if the file is larger than cap bytes.
  virtual Status Read(uint64_t cap, std::string* data) = 0;

  // Whether the path still names the locked file: someone may have removed or
  // replaced it. False after Release.
  virtual Status HeldPathIsMine(bool* mine) = 0;
};

// The only way to the operating system for checkpoint files.
//
// Threads: every method may be called by several threads at once.
//
// Survives a crash: of what these methods change, only what a successful
// WritableFile::Sync (data, size) or SyncDir (names) covers. A rename is atomic:
// after a crash either the old or the new names are there.
//
// Files may outlive calls on the Env, but not the Env itself. Those of the real file
// systems are closed in children made by fork, where only their destructors may run.
class Env {
 public:
  Env() = default;
  Env(const Env&) = delete;
  Env& operator=(const Env&) = delete;
  virtual ~Env() = default;

  // From now on this Env never leaves that directory by what is below it. A path below
  // the root leads through folders only: a symbolic link on the way is ELOOP, and nothing
  // is made, written, renamed, removed or given a mode after it. Reading (NewReadableFile,
  // ListDir, Stat, SyncDir) follows a link to a folder if this user, root or the owner of
  // the root directory made it: somebody may have moved a folder away and linked it back.
  // ".." is EINVAL.
  //
  // The root itself may be reached through links and need not exist yet. Once a call has
  // opened it, ESTALE if its path leads to another directory. Other paths are taken as
  // they are. An Env without links does nothing here.
  virtual void Confine(const std::string& /*root*/) {}

  // Keeps no root open. The next call opens it again, as the same one; after another
  // Confine it may be any.
  virtual void LetGo() {}

  // The mode is exact: the process's umask does not reduce it. EEXIST if there; ESTALE if
  // somebody has put another directory in its place meanwhile.
  virtual Status MakeDir(const std::string& path, uint32_t mode) = 0;

  // Creates a file that must not exist (EEXIST); never follows a link. A file
  // system that refuses direct I/O gives a plain file: see WritableFile::direct.
  virtual Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                                 std::unique_ptr<WritableFile>* file) = 0;

  // Takes a file that nobody needs any more over as a new one, with its space and
  // its old content: renames `from` to `to`, which must not exist (EEXIST), and opens
  // it with exactly this mode. What is no regular file is refused before that. EBUSY if
  // another name or anyone else, this process included, has the file; EOPNOTSUPP where
  // the file system cannot tell (it knows no leases, or no rename that does not
  // replace). Otherwise errors are those of NewReadableFile.
  //
  // With EEXIST nothing has happened. After any other failure the file may have its
  // new name already: the caller unlinks `to`, which may be missing.
  //
  // The rename comes first, so that from then on nobody finds the file under the
  // name that readers know, and who opened it before that is seen. No lock is needed
  // for this: readers take none, and only an open that the kernel is still working
  // on is missed; that reader sees wrong hashes. Nobody is signalled when a file is
  // opened meanwhile, and no signal's disposition is touched.
  //
  // Survives a crash: the old content, in every sector that is not both overwritten
  // and flushed. The rename is durable once both directories are synced; until then
  // the file may come back under its old name, with any mixture of old and new
  // sectors. REQUIRES: nothing durable refers to `from`.
  virtual Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                           std::unique_ptr<WritableFile>* file) = 0;

  // Opens a regular file (EISDIR, EINVAL otherwise) and follows no link (ELOOP). Nothing
  // else is opened: a pipe would wait, and a device may act.
  virtual Status NewReadableFile(const std::string& path, bool direct,
                                 std::unique_ptr<ReadableFile>* file) = 0;

  // Replaces `to` if it exists, and is a regular file: errors as NewReadableFile's.
  virtual Status Rename(const std::string& from, const std::string& to) = 0;

  // Makes the creations, renames and removals of names in this directory durable.
  virtual Status SyncDir(const std::string& path) = 0;

  // A regular file: what is a link (ELOOP), a folder (EISDIR) or else (EINVAL) stays.
  virtual Status Unlink(const std::string& path) = 0;
  virtual Status RemoveDir(const std::string& path) = 0;

  // Names in byte order, without "." and "..".
  virtual Status ListDir(const std::string& path, std::vector<std::string>* names) = 0;

  // Does not follow a link.
  virtual Status Stat(const std::string& path, FileInfo* info) = 0;

  // Opens the file, creating it if need be, and locks it without waiting: EAGAIN
  // if another lock holds it, in this process or another one.
  virtual Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) = 0;

  // Locks a regular file that is there, without waiting: EAGAIN while somebody holds it alone, or, for one who asks
  // for it `alone`, while anybody holds it. ENOENT if the file was removed meanwhile. A shared hold takes the right
  // to read only. Holds and Lock do not see each other. EOPNOTSUPP, ENOSYS or ENOLCK where the file system has no
  // such locks.
  //
  // This is how readers keep a file from being removed by those who ask first: who removes it holds it alone.
  virtual Status Hold(const std::string& path, bool alone, std::unique_ptr<FileLock>* lock);

  // What direct I/O demands in this directory; nullopt where it is refused. May
  // create a file ".probe-*" there, which is gone when this returns.
  virtual Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) = 0;

  // The f_type of statfs(2) for the file system of the directory `path`; 0 if it has none.
  virtual Status FileSystem(const std::string& path, uint64_t* type);

  // NewWritableFile, Pwrite, Sync, Close. After a failure the file may exist,
  // with any content.
  Status WriteFile(const std::string& path, std::string_view data, uint32_t mode);

  // The whole content; EFBIG if it is larger than cap bytes.
  Status ReadFile(const std::string& path, uint64_t cap, std::string* data);
};

// Passes every call on to another Env. A subclass overrides what it changes, so what it
// says nothing of reaches the other one, not Env's defaults.
//
// Files are those of the other Env: a subclass that changes what files do wraps them.
class EnvWrapper : public Env {
 public:
  // REQUIRES: target outlives this Env's last call, and its files.
  explicit EnvWrapper(Env* target) : target_(target) {}

  Env* target() const { return target_; }

  void Confine(const std::string& root) override { target_->Confine(root); }
  void LetGo() override { target_->LetGo(); }
  Status MakeDir(const std::string& path, uint32_t mode) override { return target_->MakeDir(path, mode); }
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override {
    return target_->NewWritableFile(path, mode, direct, file);
  }
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override {
    return target_->ReuseFile(from, to, mode, direct, file);
  }
  Status NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) override {
    return target_->NewReadableFile(path, direct, file);
  }
  Status Rename(const std::string& from, const std::string& to) override { return target_->Rename(from, to); }
  Status SyncDir(const std::string& path) override { return target_->SyncDir(path); }
  Status Unlink(const std::string& path) override { return target_->Unlink(path); }
  Status RemoveDir(const std::string& path) override { return target_->RemoveDir(path); }
  Status ListDir(const std::string& path, std::vector<std::string>* names) override {
    return target_->ListDir(path, names);
  }
  Status Stat(const std::string& path, FileInfo* info) override { return target_->Stat(path, info); }
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) override {
    return target_->Lock(path, mode, lock);
  }
  Status Hold(const std::string& path, bool alone, std::unique_ptr<FileLock>* lock) override {
    return target_->Hold(path, alone, lock);
  }
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override {
    return target_->DirectIo(dir, alignment);
  }
  Status FileSystem(const std::string& path, uint64_t* type) override { return target_->FileSystem(path, type); }

 private:
  Env* const target_;
};

}  // namespace layerwise

#endif  // LAYERWISE_ENV_H_
