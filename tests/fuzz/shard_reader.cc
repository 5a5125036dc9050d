// SPDX-License-Identifier: Apache-2.0
// Fuzzes ShardReader: what a header may make a reader ask for, on a file of any length that may be cut meanwhile.
//
// With clang: libFuzzer's own main. With another compiler: -DLAYERWISE_FUZZ_DRIVER gives it a main that is guided by the
// coverage that GCC's -fsanitize-coverage=trace-pc tells. bash tests/fuzz/native.sh builds and runs either.

#include "layerwise/shard_reader.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "layerwise/hash.h"
#include "memory_env.h"

namespace {

// Takes values off the front of the input; zeros once it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <typename T>
  T Take() {
    T value = 0;
    const size_t n = std::min(sizeof(T), left_);
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    left_ -= n;
    return value;
  }

  std::string Rest() const { return std::string(reinterpret_cast<const char*>(data_), left_); }

 private:
  const uint8_t* data_;
  size_t left_;
};

void Require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

// A number that is mostly within the file, and now and then beyond all files.
uint64_t Place(Input* input) {
  switch (input->Take<uint8_t>() % 4) {
    case 0:
      return input->Take<uint8_t>();
    case 1:
      return input->Take<uint16_t>();
    case 2:
      return 4096u * input->Take<uint8_t>();
    default:
      return input->Take<uint64_t>();
  }
}

layerwise::WriterPool* Pool() {
  static layerwise::WriterPool* const pool = [] {
    std::unique_ptr<layerwise::WriterPool> made;
    Require(layerwise::WriterPool::Create({.depth = 2}, &made).ok(), "a pool");
    return made.release();
  }();
  return pool;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using layerwise::ShardReader;
  Input input(data, size);
  const bool direct = input.Take<uint8_t>() & 1;
  std::vector<ShardReader::Block> blocks(input.Take<uint8_t>() % 8);
  std::vector<ShardReader::Segment> segments(input.Take<uint8_t>() % 8);
  std::string content(input.Take<uint16_t>() % 20000, '\0');
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 + i / 4096);

  for (ShardReader::Block& block : blocks) {
    block.offset = Place(&input);
    block.length = Place(&input);
    block.hashed = input.Take<uint8_t>() & 1;
    block.hash = 0;
    // Half of the hashes are right.
    if (block.offset < content.size() && block.length <= content.size() - block.offset && input.Take<uint8_t>() & 1) {
      block.hash = layerwise::Xxh3(content.data() + block.offset, block.length);
    }
  }
  std::vector<std::string> memory(segments.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].block = input.Take<uint8_t>() % 9;
    segments[i].block_offset = Place(&input);
    segments[i].length = Place(&input);
    // What is longer than the file can't be copied: it must be refused, or its block is bad.
    memory[i].assign(std::min<uint64_t>(segments[i].length, content.size()), '-');
    segments[i].address = reinterpret_cast<uintptr_t>(memory[i].data());
  }

  layerwise::MemoryEnv env;
  Require(env.WriteFile("/s", content, 0600).ok(), "a file");
  std::unique_ptr<ShardReader> opened;
  Require(ShardReader::Open(&env, Pool(), "/s", direct, &opened).ok(), "opened");
  const std::shared_ptr<ShardReader> reader = std::move(opened);
  std::string read;
  const uint64_t from = Place(&input);
  const uint64_t n = std::min<uint64_t>(Place(&input), 1 << 20);
  if (reader->Read(from, n, &read).ok()) {
    const uint64_t there = from < content.size() ? std::min<uint64_t>(n, content.size() - from) : 0;
    Require(read.size() == there, "as much as there is");
    Require(there == 0 || content.compare(from, there, read) == 0, "what the file holds");
  }
  std::vector<size_t> bad;
  if (!reader->ReadBlocks(blocks, segments, &bad).ok()) return 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const ShardReader::Segment& segment = segments[i];
    Require(segment.block < blocks.size(), "a segment of a block");
    const ShardReader::Block& block = blocks[segment.block];
    Require(segment.length <= block.length && segment.block_offset <= block.length - segment.length, "within its block");
    if (std::find(bad.begin(), bad.end(), segment.block) != bad.end()) {
      Require(memory[i] == std::string(memory[i].size(), '-'), "nothing of a bad block");
    } else {
      Require(segment.length <= content.size() &&
                  content.compare(block.offset + segment.block_offset, segment.length, memory[i]) == 0,
              "what the block holds");
    }
  }
  return 0;
}

#ifdef LAYERWISE_FUZZ_DRIVER

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>

namespace {
constexpr size_t kPlaces = 1 << 16;
uint8_t places[kPlaces];
}  // namespace

// Called at every edge of what is compiled with -fsanitize-coverage=trace-pc.
extern "C" __attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc() {
  const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  places[(here ^ here >> 16) % kPlaces] = 1;
}

// fuzzer CORPUS SECONDS SEED: keeps in CORPUS what reaches new places.
int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  if (argc != 4) return 2;
  std::mt19937_64 draw(std::strtoull(argv[3], nullptr, 10));
  std::vector<uint8_t> seen(kPlaces);
  std::vector<std::string> inputs = {std::string(1, '\0')};
  size_t reached = 0;
  uint64_t runs = 0;
  const auto run = [&](const std::string& input) {
    std::memset(places, 0, sizeof(places));
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    ++runs;
    bool fresh = false;
    for (size_t i = 0; i < kPlaces; ++i) {
      if (!places[i] || seen[i]) continue;
      seen[i] = 1;
      ++reached;
      fresh = true;
    }
    return fresh;
  };
  fs::create_directories(argv[1]);
  for (const auto& entry : fs::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    run(inputs.back());
  }
  const size_t stored = inputs.size() - 1;
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[2]));
  while (std::chrono::steady_clock::now() < until) {
    std::string input = inputs[draw() % inputs.size()];
    for (uint64_t changes = 1 + draw() % 4; changes > 0; --changes) {
      const size_t at = draw() % (input.size() + 1);
      switch (draw() % 4) {
        case 0:
          if (at < input.size()) input[at] = static_cast<char>(draw());
          break;
        case 1:
          input.insert(at, 1 + draw() % 16, static_cast<char>(draw()));
          break;
        case 2:
          input.erase(at, 1 + draw() % 8);
          break;
        default:
          input.insert(at, inputs[draw() % inputs.size()].substr(0, 32));
      }
    }
    input.resize(std::min<size_t>(input.size(), 512));
    if (!run(input)) continue;
    char name[32];
    std::snprintf(name, sizeof(name), "%016llx",
                  static_cast<unsigned long long>(layerwise::Xxh3(input.data(), input.size())));
    std::ofstream(fs::path(argv[1]) / name, std::ios::binary) << input;
    inputs.push_back(std::move(input));
  }
  std::printf("shard reader: %llu inputs, %zu in the corpus at first, %zu at the end, %zu places reached\n",
              static_cast<unsigned long long>(runs), stored, inputs.size() - 1, reached);
  return runs > 100 && reached > 100 ? 0 : 1;
}

#endif  // LAYERWISE_FUZZ_DRIVER
