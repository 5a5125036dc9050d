// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_NVM_ENV_H_
#define LAYERWISE_NVM_ENV_H_

#include "layerwise/posix_env.h"

namespace layerwise {

// PosixEnv for persistent memory. Its direct writable files are mappings of a DAX
// file system, demand no alignment, and are written by the calling thread (see
// nvm_file.h); all else is PosixEnv's, and so is every contract. Without DAX a
// direct file is EOPNOTSUPP, "no DAX here", never a plain file instead.
//
// A file that someone else truncates while it is written kills the process (SIGBUS),
// as with every mapping: like all of the engine's files, they are nobody else's.
class NvmEnv final : public PosixEnv {
 public:
  // Whether files in this directory can be mapped durably: OK, or EOPNOTSUPP. May
  // create a file ".probe-*" there, which is gone when this returns.
  Status Probe(const std::string& dir);

  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override;
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override;

  // {1, 1}; where there is no DAX, Probe's error.
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override;
};

}  // namespace layerwise

#endif  // LAYERWISE_NVM_ENV_H_
