// SPDX-License-Identifier: Apache-2.0
#include "layerwise/hash_job.h"

#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "answers.h"
#include "layerwise/hash.h"
#include "scratch.h"

namespace layerwise {

TEST_CASE("a job gives the hash of each piece, however many there are and whoever hashes them") {
  const std::string data = Pattern(300000);
  for (size_t count : {0, 1, 2, 1000}) {
    std::vector<HashJob::Piece> pieces;
    std::vector<uint64_t> expected;
    for (size_t i = 0; i < count; ++i) {
      pieces.push_back({data.data() + i, i * 251});
      expected.push_back(Xxh3(data.data() + i, i * 251));
    }
    HashJob at_once(pieces), later(pieces);
    CHECK(at_once.Hashes() == expected);
    CHECK(at_once.Hashes() == expected);
    std::this_thread::yield();
    CHECK(later.Hashes() == expected);
  }
}

TEST_CASE("a job that nobody waits for reads nothing any more once it is destroyed") {
  for (int round = 0; round < 200; ++round) {
    std::string data = Pattern(100000);
    {
      const HashJob job({{data.data(), 50000}, {data.data() + 50000, 50000}, {data.data(), data.size()}});
    }
    data.assign(data.size(), 'x');  // the sanitizers would see a thread that still reads
  }
}

TEST_CASE("a child made by fork is not held up by its parent's jobs") {
  const std::string data = Pattern(4 << 20);
  const uint64_t expected = Xxh3(data.data(), data.size());
  HashJob before({{data.data(), data.size()}});
  const pid_t child = fork();
  if (child == 0) {
    before.~HashJob();
    Leave(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  CHECK(before.Hashes().front() == expected);
}

}  // namespace layerwise
