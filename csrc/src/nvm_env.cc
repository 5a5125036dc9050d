#include "layerwise/nvm_env.h"

#include <unistd.h>

#include <utility>

#include "nvm_file.h"

namespace layerwise {

Status NvmEnv::Probe(const std::string& dir) {
  std::string path;
  Descriptor fd;
  Status status = CreateProbe(dir, &path, &fd);
  if (!status.ok()) return status;
  NvmWritableFile file(dir, std::move(fd));
  status = file.Open();
  return status.ok() ? file.Close() : status;
}

Status NvmEnv::NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                               std::unique_ptr<WritableFile>* file) {
  if (!direct) return PosixEnv::NewWritableFile(path, mode, direct, file);
  Descriptor fd;
  Status status = CreateExclusive(path, mode, &fd);
  if (!status.ok()) return status;
  auto made = std::make_unique<NvmWritableFile>(path, std::move(fd));
  status = made->Open();
  if (status.ok()) {
    *file = std::move(made);
  } else {
    unlink(path.c_str());
  }
  return status;
}

Status NvmEnv::ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) {
  if (!direct) return PosixEnv::ReuseFile(from, to, mode, direct, file);
  Descriptor fd;
  Status status = TakeOver(from, to, mode, &fd);
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
