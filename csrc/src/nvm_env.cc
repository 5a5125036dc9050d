// SPDX-License-Identifier: Apache-2.0
#include "layerwise/nvm_env.h"

#include <unistd.h>

#include <utility>

#include "nvm_file.h"
#include "roots.h"

namespace layerwise {

Status NvmEnv::Probe(const std::string& dir) {
  std::string path;
  Descriptor fd;
  Status status = CreateProbe(roots(), dir, &path, &fd);
  if (!status.ok()) return status;
  NvmWritableFile file(dir, std::move(fd));
  status = file.Open();
  return status.ok() ? file.Close() : status;
}

Status NvmEnv::NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                               std::unique_ptr<WritableFile>* file) {
  if (!direct) return PosixEnv::NewWritableFile(path, mode, direct, file);
  Place place;
  Descriptor fd;
  Status status = roots().Find("create", path, Links::kRefused, &place);
  if (status.ok()) status = CreateExclusive(place, path, mode, &fd);
  if (!status.ok()) return status;
  auto made = std::make_unique<NvmWritableFile>(path, std::move(fd));
  status = made->Open();
  if (status.ok()) {
    *file = std::move(made);
  } else {
    unlinkat(place.dir(), place.name(), 0);
  }
  return status;
}

Status NvmEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) {
  if (!direct) return PosixEnv::ReuseFile(from, to, mode, direct, file);
  Descriptor fd;
  Status status = TakeOver(roots(), from, to, mode, &fd);
  if (!status.ok()) return status;
  auto taken = std::make_unique<NvmWritableFile>(to, std::move(fd));
  status = taken->Open();
  if (status.ok()) *file = std::move(taken);
  return status;
}

Status NvmEnv::DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) {
  Status status = Probe(dir);
  if (status.ok()) *alignment = DirectIoAlignment{1, 1};
  return status;
}

}  // namespace layerwise
