// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_TESTING_AFTER_CRASH_H_
#define LAYERWISE_TESTING_AFTER_CRASH_H_

#include <cstdint>
#include <span>
#include <string_view>

#include "disk_image.h"
#include "layerwise/status.h"

namespace layerwise {

// What a power failure leaves of operations that no flush covers.
enum class CrashPolicy {
  kNone,    // nothing
  kAll,     // everything
  kNames,   // all operations on directories, no data
  kData,    // all data, no operation on directories
  kRandom,  // any subset, drawn from the seed
};

Status ParsePolicy(std::string_view name, CrashPolicy* policy);

// What the disk may hold if power failed after these operations. Stricter than a
// real journal:
//  - data and size of a file are durable only by a later kSync of it;
//  - an entry of a directory is durable only by a later kSyncDir of the directory,
//    a rename between two directories only by one of each; kSync of a file does
//    not make its name durable;
//  - a rename happened or not, as a whole;
//  - with kRandom each 512-byte sector holds its old bytes or those of any later
//    write, each file has its old or its new size, and each operation on a
//    directory happened or not, all independently. Operations act on inodes, in
//    their order: a rename may survive whose create did not.
// What no name leads to is gone.
DiskImage AfterCrash(const DiskImage& initial, std::span<const DiskOp> ops, uint64_t seed, CrashPolicy policy);

}  // namespace layerwise

#endif  // LAYERWISE_TESTING_AFTER_CRASH_H_
