// SPDX-License-Identifier: Apache-2.0
#include "layerwise/hash.h"

#include <algorithm>
#include <string>
#include <vector>

#include "scratch.h"

namespace layerwise {

TEST_CASE("XXH3-64 gives the published values") {
  CHECK(Xxh3("", 0) == 0x2D06800538D394C2u);
  // From xxHash's sanity test: its generator, seed 0.
  std::string data(2048, '\0');
  uint64_t generator = 2654435761u;
  for (char& byte : data) {
    byte = static_cast<char>(generator >> 56);
    generator *= 11400714785074694797u;
  }
  CHECK(Xxh3(data.data(), 1) == 0xC44BDFF4074EECDBu);
  CHECK(Xxh3(data.data(), 6) == 0x27B56A84CD2D7325u);
  CHECK(Xxh3(data.data(), 12) == 0xA713DAF0DFBB77E7u);
  CHECK(Xxh3(data.data(), 24) == 0xA3FE70BF9D3510EBu);
  CHECK(Xxh3(data.data(), 48) == 0x397DA259ECBA1F11u);
  CHECK(Xxh3(data.data(), 403) == 0xCDEB804D65C6DEA4u);
  CHECK(Xxh3(data.data(), 2048) == 0xDD59E2C3A5F038E0u);
}

TEST_CASE("every instruction set gives the same hash, at every length and alignment") {
  const std::string data = Pattern(10000);
  for (const HashVariant& variant : HashVariants()) {
    CAPTURE(variant.name);
    for (size_t n : {0, 1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 512, 1023, 1024, 1025, 4096, 9000}) {
      for (size_t shift : {0, 1, 7, 64}) {
        CHECK(variant.hash(data.data() + shift, n) == HashVariants().back().hash(data.data() + shift, n));
      }
    }
  }
  CHECK(HashName() == HashVariants().front().name);
}

TEST_CASE("a stream gives the hash of all that came since it was reset, with every instruction set") {
  const std::string data = Pattern(300000);
  for (const HashVariant& variant : HashVariants()) {
    CAPTURE(variant.name);
    alignas(64) char state[Xxh3Stream::kStateBytes];
    for (size_t step : {1, 255, 256, 4096, 131072, 300000}) {
      for (size_t n : {0, 1, 240, 241, 1024, 20000, 300000}) {
        if (n / step > 5000) continue;
        variant.reset(state);
        Xxh3Stream stream;
        stream.Update("left behind", 11);
        stream.Reset();
        for (size_t at = 0; at < n; at += step) {
          variant.update(state, data.data() + at, std::min(step, n - at));
          stream.Update(data.data() + at, std::min(step, n - at));
        }
        CHECK(variant.digest(state) == Xxh3(data.data(), n));
        CHECK(stream.Digest() == Xxh3(data.data(), n));
      }
    }
  }
}

TEST_CASE("pieces hash as the string that they make") {
  const std::string data = Pattern(300000);
  for (const HashVariant& variant : HashVariants()) {
    CAPTURE(variant.name);
    for (size_t pieces : {1, 2, 3, 7, 64}) {
      for (size_t n : {0, 1, 240, 241, 1024, 4096, 300000}) {
        std::vector<iovec> runs;
        size_t begin = 0;
        for (size_t i = 0; i < pieces; ++i) {
          const size_t end = i + 1 == pieces ? n : begin + (n - begin) * (i % 3) / 4;
          runs.push_back({const_cast<char*>(data.data()) + begin, end - begin});
          begin = end;
        }
        CHECK(variant.runs(runs.data(), runs.size()) == Xxh3(data.data(), n));
        CHECK(Xxh3Runs(runs.data(), runs.size()) == Xxh3(data.data(), n));
      }
    }
  }
}

}  // namespace layerwise
