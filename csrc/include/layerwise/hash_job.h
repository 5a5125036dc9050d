// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_HASH_JOB_H_
#define LAYERWISE_HASH_JOB_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace layerwise {

// Hashes of pieces of memory, made on a thread that is there for nothing else, while the
// caller does something else. Who waits for them helps, so that nobody waits for a thread
// that finds no processor, or could not be started.
//
// Threads: one uses a job at a time.
class HashJob {
 public:
  struct Piece {
    const void* data;
    size_t n;
  };

  // Begins, after jobs that were begun before.
  // REQUIRES: the memory stays readable until Hashes has returned or the job is destroyed.
  explicit HashJob(std::vector<Piece> pieces);

  // Waits for the pieces that are being hashed; the others are left out. In a child made by
  // fork it does nothing.
  ~HashJob();

  HashJob(const HashJob&) = delete;
  HashJob& operator=(const HashJob&) = delete;

  // Xxh3 of each piece. Returns when all are hashed.
  // REQUIRES: the process that began it.
  const std::vector<uint64_t>& Hashes();

  // What is shared with the thread.
  struct Work;

 private:
  const std::shared_ptr<Work> work_;
  const pid_t process_;
};

}  // namespace layerwise

#endif  // LAYERWISE_HASH_JOB_H_
