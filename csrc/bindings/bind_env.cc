// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/unique_ptr.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "convert.h"
#include "layerwise/aligned_buffer.h"
#include "layerwise/calls.h"
#include "layerwise/mock_env.h"
#include "layerwise/nvm_env.h"
#include "layerwise/posix_env.h"

namespace layerwise {

namespace {

using Path = std::filesystem::path;

// Unlocked, for a call that may not return.
template <typename F>
void Disk(const char* operation, const Path& path, F&& f) {
  const OngoingCall call(operation, path.native());
  Unlocked(std::forward<F>(f));
}

const char* KindName(FileKind kind) {
  switch (kind) {
    case FileKind::kFile:
      return "file";
    case FileKind::kDirectory:
      return "dir";
    case FileKind::kLink:
      return "link";
    default:
      return "other";
  }
}

std::unique_ptr<WritableFile> Create(Env& env, const Path& path, uint32_t mode, bool direct) {
  std::unique_ptr<WritableFile> file;
  Disk("create", path, [&] { return env.NewWritableFile(path.native(), mode, direct, &file); });
  return file;
}

std::unique_ptr<WritableFile> Reuse(Env& env, const Path& src, const Path& dst, uint32_t mode, bool direct) {
  std::unique_ptr<WritableFile> file;
  Disk("reuse", src, [&] { return env.ReuseFile(src.native(), dst.native(), mode, direct, &file); });
  return file;
}

std::unique_ptr<ReadableFile> Open(Env& env, const Path& path, bool direct) {
  std::unique_ptr<ReadableFile> file;
  Disk("open", path, [&] { return env.NewReadableFile(path.native(), direct, &file); });
  return file;
}

std::unique_ptr<FileLock> Lock(Env& env, const Path& path, uint32_t mode) {
  std::unique_ptr<FileLock> lock;
  Disk("lock", path, [&] { return env.Lock(path.native(), mode, &lock); });
  return lock;
}

std::unique_ptr<FileLock> Hold(Env& env, const Path& path, bool alone) {
  std::unique_ptr<FileLock> lock;
  Disk("hold", path, [&] { return env.Hold(path.native(), alone, &lock); });
  return lock;
}

nb::list ListDir(Env& env, const Path& path) {
  std::vector<std::string> names;
  Disk("list directory", path, [&] { return env.ListDir(path.native(), &names); });
  nb::list out;
  for (const std::string& name : names) out.append(DecodePath(name));
  return out;
}

nb::tuple Stat(Env& env, const Path& path) {
  FileInfo info;
  Disk("look at", path, [&] { return env.Stat(path.native(), &info); });
  return nb::make_tuple(KindName(info.kind), info.size);
}

nb::object DirectIo(Env& env, const Path& dir) {
  std::optional<DirectIoAlignment> alignment;
  Disk("probe", dir, [&] { return env.DirectIo(dir.native(), &alignment); });
  if (!alignment) return nb::none();
  return nb::make_tuple(alignment->memory, alignment->offset);
}

nb::bytes Pread(ReadableFile& file, uint64_t n, uint64_t offset) {
  AlignedBuffer buffer;
  size_t got = 0;
  const uint64_t wanted = offset < file.size() ? std::min(n, file.size() - offset) : 0;
  const size_t length = RoundUp(wanted, file.alignment().offset);
  Unlocked([&] {
    Status status = buffer.Reserve(length);
    return status.ok() && length > 0 ? file.Pread(buffer.data(), length, offset, &got) : status;
  });
  return nb::bytes(buffer.data(), std::min<size_t>(got, wanted));
}

void BindFiles(nb::module_& m) {
  nb::class_<WritableFile>(m, "WritableFile")
      .def_prop_ro("direct", &WritableFile::direct)
      .def_prop_ro("memory_align", [](const WritableFile& file) { return file.alignment().memory; })
      .def_prop_ro("offset_align", [](const WritableFile& file) { return file.alignment().offset; })
      .def("pwrite",
           [](WritableFile& file, nb::handle data, uint64_t offset) {
             BufferView view(data);
             Disk("write", "", [&] { return file.Pwrite(view.data(), view.size(), offset); });
           }, nb::arg("data"), nb::arg("offset"))
      .def("allocate",
           [](WritableFile& file, uint64_t size) {
             Disk("allocate", "", [&] { return file.Allocate(size); });
           }, nb::arg("size"))
      .def("truncate",
           [](WritableFile& file, uint64_t size) {
             Disk("truncate", "", [&] { return file.Truncate(size); });
           }, nb::arg("size"))
      .def("sync", [](WritableFile& file) { Disk("flush", "", [&] { return file.Sync(); }); })
      .def("close", [](WritableFile& file) { Disk("close", "", [&] { return file.Close(); }); });

  nb::class_<ReadableFile>(m, "ReadableFile")
      .def_prop_ro("size", &ReadableFile::size)
      .def_prop_ro("direct", &ReadableFile::direct)
      .def_prop_ro("memory_align", [](const ReadableFile& file) { return file.alignment().memory; })
      .def_prop_ro("offset_align", [](const ReadableFile& file) { return file.alignment().offset; })
      .def("pread", &Pread, nb::arg("n"), nb::arg("offset"))
      .def("close", [](ReadableFile& file) { Disk("close", "", [&] { return file.Close(); }); });

  nb::class_<FileLock>(m, "FileLock")
      .def("release", [](FileLock& lock) { Disk("release the lock", "", [&] { return lock.Release(); }); })
      .def("write",
           [](FileLock& lock, nb::handle data) {
             BufferView view(data);
             Disk("write the lock", "", [&] { return lock.Write(view.view()); });
           }, nb::arg("data"))
      .def("read",
           [](FileLock& lock, uint64_t cap) {
             std::string data;
             Disk("read the lock", "", [&] { return lock.Read(cap, &data); });
             return ToBytes(data);
           }, nb::arg("cap"))
      .def("held_path_is_mine", [](FileLock& lock) {
        bool mine = false;
        Disk("look at the lock", "", [&] { return lock.HeldPathIsMine(&mine); });
        return mine;
      });
}

}  // namespace

void BindEnv(nb::module_& m) {
  BindFiles(m);
  nb::class_<Env>(m, "Env")
      .def("confine", [](Env& env, const Path& root) { env.Confine(root.native()); }, nb::arg("root"))
      .def("let_go", [](Env& env) { env.LetGo(); })
      .def("make_dir",
           [](Env& env, const Path& path, uint32_t mode) {
             Disk("make directory", path, [&] { return env.MakeDir(path.native(), mode); });
           }, nb::arg("path"), nb::arg("mode") = 0700)
      .def("create", &Create, nb::arg("path"), nb::arg("mode") = 0600, nb::arg("direct") = false,
           nb::keep_alive<0, 1>())
      .def("reuse", &Reuse, nb::arg("src"), nb::arg("dst"), nb::arg("mode") = 0600, nb::arg("direct") = false,
           nb::keep_alive<0, 1>())
      .def("open", &Open, nb::arg("path"), nb::arg("direct") = false, nb::keep_alive<0, 1>())
      .def("rename",
           [](Env& env, const Path& src, const Path& dst) {
             Disk("rename", src, [&] { return env.Rename(src.native(), dst.native()); });
           }, nb::arg("src"), nb::arg("dst"))
      .def("sync_dir",
           [](Env& env, const Path& path) {
             Disk("flush directory", path, [&] { return env.SyncDir(path.native()); });
           }, nb::arg("path"))
      .def("unlink",
           [](Env& env, const Path& path) {
             Disk("unlink", path, [&] { return env.Unlink(path.native()); });
           }, nb::arg("path"))
      .def("remove_dir",
           [](Env& env, const Path& path) {
             Disk("remove directory", path, [&] { return env.RemoveDir(path.native()); });
           }, nb::arg("path"))
      .def("list_dir", &ListDir, nb::arg("path"))
      .def("stat", &Stat, nb::arg("path"))
      .def("write_file",
           [](Env& env, const Path& path, nb::handle data, uint32_t mode) {
             BufferView view(data);
             Disk("write file", path, [&] { return env.WriteFile(path.native(), view.view(), mode); });
           }, nb::arg("path"), nb::arg("data"), nb::arg("mode") = 0600)
      .def("read_file",
           [](Env& env, const Path& path, uint64_t cap) {
             std::string data;
             Disk("read file", path, [&] { return env.ReadFile(path.native(), cap, &data); });
             return ToBytes(data);
           }, nb::arg("path"), nb::arg("cap"))
      .def("lock", &Lock, nb::arg("path"), nb::arg("mode") = 0600, nb::keep_alive<0, 1>())
      .def("hold", &Hold, nb::arg("path"), nb::arg("alone") = false, nb::keep_alive<0, 1>())
      .def("direct_io", &DirectIo, nb::arg("path"))
      .def("file_system",
           [](Env& env, const Path& path) {
             uint64_t type = 0;
             Disk("look at", path, [&] { return env.FileSystem(path.native(), &type); });
             return type;
           }, nb::arg("path"));
  nb::class_<PosixEnv, Env>(m, "PosixEnv").def(nb::init<>());
  nb::class_<MockEnv, Env>(m, "MockEnv")
      .def(nb::init<>())
      .def_prop_ro("files", [](const MockEnv& env) { return env.counts().files; })
      .def_prop_ro("bytes", [](const MockEnv& env) { return env.counts().bytes; })
      .def_prop_ro("syncs", [](const MockEnv& env) { return env.counts().syncs; });
  nb::class_<NvmEnv, PosixEnv>(m, "NvmEnv")
      .def(nb::init<>())
      .def("probe",
           [](NvmEnv& env, const Path& path) {
             Disk("probe", path, [&] { return env.Probe(path.native()); });
           }, nb::arg("path"));
}

}  // namespace layerwise
