// SPDX-License-Identifier: Apache-2.0
#include "durable_store.h"

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "scratch.h"

namespace layerwise {

namespace {

// A processor with its caches, and the list of what is on the way to persistent
// memory. Power loss takes what is in a cache or was not fenced.
class ListedCpu {
 public:
  explicit ListedCpu(size_t n) : memory_(n + kCacheLine, '.') {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    base_ = memory_.data() + (kCacheLine - at % kCacheLine) % kCacheLine;
    kept_.assign(base_, n);
  }
  virtual ~ListedCpu() = default;

  virtual void Copy(char* out, const char* in, size_t n) {
    std::memcpy(out, in, n);
    for (size_t line = LineOf(out); line <= LineOf(out + n - 1); ++line) dirty_.insert(line);
  }
  virtual void Flush(const char* at) {
    if (dirty_.erase(LineOf(at)) > 0) on_the_way_.insert(LineOf(at));
  }
  virtual void Stream(char* out, const char* in) {
    REQUIRE((out - base_) % kCacheLine == 0);
    std::memcpy(out, in, kCacheLine);
    on_the_way_.insert(LineOf(out));
  }
  virtual void Fence() {
    for (const size_t line : on_the_way_) {
      kept_.replace(line * kCacheLine, kCacheLine, base_ + line * kCacheLine, kCacheLine);
    }
    on_the_way_.clear();
  }

  char* at(size_t offset) { return base_ + offset; }
  const std::string& kept() const { return kept_; }

 private:
  size_t LineOf(const char* at) const { return static_cast<size_t>(at - base_) / kCacheLine; }

  std::vector<char> memory_;
  char* base_;
  std::string kept_;
  std::set<size_t> dirty_, on_the_way_;
};

class Unfenced final : public ListedCpu {
  using ListedCpu::ListedCpu;
  void Fence() override {}
};

class Unflushed final : public ListedCpu {
  using ListedCpu::ListedCpu;
  void Flush(const char*) override {}
};

class Cached final : public ListedCpu {
  using ListedCpu::ListedCpu;
  void Stream(char* out, const char* in) override { Copy(out, in, kCacheLine); }
};

// Whether every store does, at each offset in a line and of each length up to three of
// them, and nothing beside it is changed.
template <typename Cpu>
bool AllSurvive() {
  constexpr size_t kBytes = 5 * kCacheLine;
  const std::string data = Pattern(3 * kCacheLine);
  for (size_t offset = 0; offset < kCacheLine; ++offset) {
    for (size_t n = 1; n <= data.size(); ++n) {
      Cpu cpu(kBytes);
      std::string expected(kBytes, '.');
      expected.replace(offset, n, data, 0, n);
      StoreDurably(static_cast<ListedCpu&>(cpu), cpu.at(offset), data.data(), n);
      if (cpu.kept() != expected) return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("what was stored into persistent memory survives power loss, at every offset and length") {
  CHECK(AllSurvive<ListedCpu>());
}

TEST_CASE("mutation: stores that are not fenced, not flushed, or left in a cache are caught") {
  CHECK(!AllSurvive<Unfenced>());
  CHECK(!AllSurvive<Unflushed>());
  CHECK(!AllSurvive<Cached>());
}

}  // namespace layerwise
