// SPDX-License-Identifier: Apache-2.0
#include "layerwise/env.h"

#include <cerrno>

namespace layerwise {

Status WritableFile::Pwritev(const iovec* pieces, int count, uint64_t offset) {
  for (int i = 0; i < count; ++i) {
    Status status = Pwrite(pieces[i].iov_base, pieces[i].iov_len, offset);
    if (!status.ok()) return status;
    offset += pieces[i].iov_len;
  }
  return Status::Ok();
}

Status Env::Hold(const std::string& path, bool, std::unique_ptr<FileLock>*) {
  return Status::IoError(EOPNOTSUPP, "hold", path);
}

Status Env::FileSystem(const std::string&, uint64_t* type) {
  *type = 0;
  return Status::Ok();
}

Status Env::WriteFile(const std::string& path, std::string_view data, uint32_t mode) {
  std::unique_ptr<WritableFile> file;
  Status status = NewWritableFile(path, mode, false, &file);
  if (status.ok() && !data.empty()) status = file->Pwrite(data.data(), data.size(), 0);
  if (status.ok()) status = file->Sync();
  if (status.ok()) status = file->Close();
  return status;
}

Status Env::ReadFile(const std::string& path, uint64_t cap, std::string* data) {
  std::unique_ptr<ReadableFile> file;
  Status status = NewReadableFile(path, false, &file);
  if (!status.ok()) return status;
  if (file->size() > cap) return Status::IoError(EFBIG, "read", path);
  data->resize(file->size());
  size_t got = 0;
  status = file->Pread(data->data(), data->size(), 0, &got);
  data->resize(got);
  return status;
}

}  // namespace layerwise
