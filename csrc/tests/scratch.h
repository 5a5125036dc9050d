// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTS_SCRATCH_H_
#define LAYERWISE_TESTS_SCRATCH_H_

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "layerwise/nvm_env.h"
#include "layerwise/posix_env.h"
#include "layerwise/status.h"

#define REQUIRE_OK(expression)                               \
  do {                                                       \
    const ::layerwise::Status status_of_it = (expression);   \
    REQUIRE_MESSAGE(status_of_it.ok(), status_of_it.ToString()); \
  } while (false)

#define CHECK_ERRNO(expression, error) CHECK((expression).error_number() == (error))

namespace layerwise {

// What LAYERWISE_TEST_BACKEND says: posix (if unset) or nvm. The virtual machine of
// tests/vm runs all tests of files on the Env that this names.
inline bool OnNvm() {
  const char* const backend = std::getenv("LAYERWISE_TEST_BACKEND");
  const std::string name = backend == nullptr ? "posix" : backend;
  REQUIRE_MESSAGE((name == "posix" || name == "nvm"), "LAYERWISE_TEST_BACKEND is ", name);
  return name == "nvm";
}

inline Env& DiskEnv() {
  static PosixEnv posix;
  static NvmEnv nvm;
  return OnNvm() ? static_cast<Env&>(nvm) : posix;
}

// How many of `full` rounds of a sweep to run: one of LAYERWISE_TEST_SHORT, if that is set.
// tests/native.sh sets it for the sanitizers, and tests/vm/run.sh for the machine that is
// emulated: beside both, all rounds run in the plain build.
inline int Rounds(int full) {
  const char* const of = std::getenv("LAYERWISE_TEST_SHORT");
  const int each = of == nullptr ? 1 : std::max(1, std::atoi(of));
  return (full + each - 1) / each;
}

// A directory of its own for one test, in LAYERWISE_TEST_DIR or the system's place
// for temporary files; removed at the end.
class ScratchDir {
 public:
  ScratchDir() {
    const char* const chosen = std::getenv("LAYERWISE_TEST_DIR");
    const std::filesystem::path parent = chosen == nullptr ? std::filesystem::temp_directory_path() : chosen;
    std::string path = (parent / "layerwise-test-XXXXXX").string();
    REQUIRE(mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  ~ScratchDir() { std::filesystem::remove_all(path_); }

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// The permission bits of a file, of a link itself.
inline uint32_t ModeOf(const std::string& path) {
  struct stat info;
  REQUIRE(lstat(path.c_str(), &info) == 0);
  return info.st_mode & 07777;
}

// Bytes that differ from place to place; eight at a time, since tests are built without
// optimization and run on an emulated processor too.
inline std::string Pattern(size_t n, uint64_t seed = 1) {
  std::string data(n, '\0');
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (size_t at = 0; at < n; at += sizeof state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t mixed = state ^ state >> 29;  // its low bits alone repeat soon
    std::memcpy(data.data() + at, &mixed, std::min(sizeof mixed, n - at));
  }
  return data;
}

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_SCRATCH_H_
