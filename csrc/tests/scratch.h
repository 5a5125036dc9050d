#ifndef LAYERWISE_TESTS_SCRATCH_H_
#define LAYERWISE_TESTS_SCRATCH_H_

#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <string>

#include "layerwise/status.h"

#define REQUIRE_OK(expression)                               \
  do {                                                       \
    const ::layerwise::Status status_of_it = (expression);   \
    REQUIRE_MESSAGE(status_of_it.ok(), status_of_it.ToString()); \
  } while (false)

#define CHECK_ERRNO(expression, error) CHECK((expression).error_number() == (error))

namespace layerwise {

// A directory of its own for one test, removed at the end.
class ScratchDir {
 public:
  ScratchDir() {
    std::string path = (std::filesystem::temp_directory_path() / "layerwise-test-XXXXXX").string();
    REQUIRE(mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  ~ScratchDir() { std::filesystem::remove_all(path_); }

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Bytes that differ from place to place.
inline std::string Pattern(size_t n, uint64_t seed = 1) {
  std::string data(n, '\0');
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (char& byte : data) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<char>(state >> 56);
  }
  return data;
}

}  // namespace layerwise

#endif  // LAYERWISE_TESTS_SCRATCH_H_
