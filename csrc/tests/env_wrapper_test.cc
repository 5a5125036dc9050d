// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <set>
#include <string>

#include "layerwise/env.h"
#include "scratch.h"

namespace layerwise {

namespace {

// Notes every call, with what it was given, and fails it with an error of its own.
class Recorder final : public Env {
 public:
  std::string last;  // "<operation> <arguments>"

  void Confine(const std::string& root) override { last = "Confine " + root; }
  void LetGo() override { last = "LetGo"; }
  Status MakeDir(const std::string& path, uint32_t mode) override { return Note("MakeDir", path, mode); }
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct, std::unique_ptr<WritableFile>*) override {
    return Note("NewWritableFile", path, mode, direct);
  }
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>*) override {
    return Note("ReuseFile", from + " " + to, mode, direct);
  }
  Status NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>*) override {
    return Note("NewReadableFile", path, direct);
  }
  Status Rename(const std::string& from, const std::string& to) override { return Note("Rename", from + " " + to); }
  Status SyncDir(const std::string& path) override { return Note("SyncDir", path); }
  Status Unlink(const std::string& path) override { return Note("Unlink", path); }
  Status RemoveDir(const std::string& path) override { return Note("RemoveDir", path); }
  Status ListDir(const std::string& path, std::vector<std::string>* names) override {
    names->push_back("listed");
    return Note("ListDir", path);
  }
  Status Stat(const std::string& path, FileInfo* info) override {
    info->size = 7;
    return Note("Stat", path);
  }
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>*) override {
    return Note("Lock", path, mode);
  }
  Status Hold(const std::string& path, bool alone, std::unique_ptr<FileLock>*) override {
    return Note("Hold", path, alone);
  }
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override {
    *alignment = DirectIoAlignment{8, 16};
    return Note("DirectIo", dir);
  }
  Status FileSystem(const std::string& path, uint64_t* type) override {
    *type = 9;
    return Note("FileSystem", path);
  }

 private:
  template <typename... Numbers>
  Status Note(const std::string& operation, const std::string& paths, Numbers... numbers) {
    last = operation + " " + paths;
    ((last += " " + std::to_string(numbers)), ...);
    return Status::IoError(EXDEV, "recorded", paths);
  }
};

struct Outcome {
  std::set<std::string> lost;  // calls of the wrapper that did not reach the target as they were made
  size_t calls = 0;
};

// Makes every call that there is. A new virtual function of Env belongs here, in Recorder and in EnvWrapper.
Outcome CallAll(Env* env, Recorder* target) {
  Outcome outcome;
  const auto expect = [&](const std::string& call, bool answered = true) {
    ++outcome.calls;
    if (target->last != call || !answered) outcome.lost.insert(call);
    target->last.clear();
  };
  const auto passed = [](const Status& status) { return status.error_number() == EXDEV; };
  std::unique_ptr<WritableFile> out;
  std::unique_ptr<ReadableFile> in;
  std::unique_ptr<FileLock> lock;
  std::vector<std::string> names;
  FileInfo info;
  std::optional<DirectIoAlignment> alignment;
  uint64_t type = 0;

  env->Confine("/r");
  expect("Confine /r");
  env->LetGo();
  expect("LetGo");
  bool ok = passed(env->MakeDir("/a", 1));
  expect("MakeDir /a 1", ok);
  ok = passed(env->NewWritableFile("/b", 2, true, &out));
  expect("NewWritableFile /b 2 1", ok);
  ok = passed(env->ReuseFile("/c", "/d", 3, false, &out));
  expect("ReuseFile /c /d 3 0", ok);
  ok = passed(env->NewReadableFile("/e", true, &in));
  expect("NewReadableFile /e 1", ok);
  ok = passed(env->Rename("/f", "/g"));
  expect("Rename /f /g", ok);
  ok = passed(env->SyncDir("/h"));
  expect("SyncDir /h", ok);
  ok = passed(env->Unlink("/i"));
  expect("Unlink /i", ok);
  ok = passed(env->RemoveDir("/j"));
  expect("RemoveDir /j", ok);
  ok = passed(env->ListDir("/k", &names));
  expect("ListDir /k", ok && names == std::vector<std::string>{"listed"});
  ok = passed(env->Stat("/l", &info));
  expect("Stat /l", ok && info.size == 7);
  ok = passed(env->Lock("/m", 4, &lock));
  expect("Lock /m 4", ok);
  ok = passed(env->Hold("/p", true, &lock));
  expect("Hold /p 1", ok);
  ok = passed(env->DirectIo("/n", &alignment));
  expect("DirectIo /n", ok && alignment && alignment->offset == 16);
  ok = passed(env->FileSystem("/o", &type));
  expect("FileSystem /o", ok && type == 9);
  return outcome;
}

// One virtual function more than Env has: its place in the table of them is how many Env has.
struct OneMore : Env {
  virtual void Last();
};

size_t VirtualFunctionsOfEnv() {
  const auto last = &OneMore::Last;
  // The offset in the table, and in one of the two words a bit that says that it is one (Itanium C++ ABI 2.3).
  size_t words[2];
  static_assert(sizeof(last) == sizeof(words));
  std::memcpy(words, &last, sizeof(words));
  constexpr size_t kDestructors = 2;
  return (words[0] & ~size_t{1}) / sizeof(void*) - kDestructors;
}

// As a wrapper would be that somebody forgot to extend.
class Forgetful final : public EnvWrapper {
 public:
  using EnvWrapper::EnvWrapper;
  Status FileSystem(const std::string& path, uint64_t* type) override { return Env::FileSystem(path, type); }
};

}  // namespace

TEST_CASE("a wrapper passes on every call that an Env has") {
  Recorder target;
  EnvWrapper wrapper(&target);
  CHECK(wrapper.target() == &target);
  const Outcome outcome = CallAll(&wrapper, &target);
  CHECK(outcome.lost.empty());
  // If this fails, Env has got a virtual function that neither this test nor, perhaps, EnvWrapper knows.
  CHECK(outcome.calls == VirtualFunctionsOfEnv());
}

TEST_CASE("a wrapper that does not pass on one call is found out") {
  Recorder target;
  Forgetful wrapper(&target);
  CHECK(CallAll(&wrapper, &target).lost == std::set<std::string>{"FileSystem /o"});
}

}  // namespace layerwise
