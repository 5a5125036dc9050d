#ifndef LAYERWISE_MOCK_ENV_H_
#define LAYERWISE_MOCK_ENV_H_

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "layerwise/env.h"

namespace layerwise {

// An Env that touches no disk: names and the content of plain files (records) are kept
// in memory, of direct files (shards) only the size, and how many bytes were written.
// Everything above it runs as it does on a disk, at the cost of the processor alone.
//
// Paths are absolute; the root is there. Nothing survives the object. A direct file
// demands alignment as a disk with sectors of 512 bytes does, and can't be read: ENODATA.
class MockEnv final : public Env {
 public:
  MockEnv();

  struct Counts {
    uint64_t files = 0;  // that were created or taken over
    uint64_t bytes = 0;  // written to direct files
    uint64_t syncs = 0;  // of files and directories
  };
  Counts counts() const;

  Status MakeDir(const std::string& path, uint32_t mode) override;
  Status NewWritableFile(const std::string& path, uint32_t mode, bool direct,
                         std::unique_ptr<WritableFile>* file) override;
  Status ReuseFile(const std::string& from, const std::string& to, uint32_t mode, bool direct,
                   std::unique_ptr<WritableFile>* file) override;
  Status NewReadableFile(const std::string& path, bool direct, std::unique_ptr<ReadableFile>* file) override;
  Status Rename(const std::string& from, const std::string& to) override;
  Status SyncDir(const std::string& path) override;
  Status Unlink(const std::string& path) override;
  Status RemoveDir(const std::string& path) override;
  Status ListDir(const std::string& path, std::vector<std::string>* names) override;
  Status Stat(const std::string& path, FileInfo* info) override;
  Status Lock(const std::string& path, uint32_t mode, std::unique_ptr<FileLock>* lock) override;
  Status DirectIo(const std::string& dir, std::optional<DirectIoAlignment>* alignment) override;

 private:
  class File;
  class Reader;
  class Held;

  struct Node {
    bool is_dir = false;
    bool discarded = false;  // a direct file
    bool locked = false;
    uint64_t size = 0;
    std::string content;
  };
  using Names = std::map<std::string, std::shared_ptr<Node>>;

  // What open files and locks share with the Env.
  struct Disk {
    std::mutex mutex;
    Names names;  // by path
    Counts counts;
  };

  // REQUIRES: the disk's mutex is held, here and below. ENOENT or ENOTDIR of what is above the path.
  Status CheckParent(const char* operation, const std::string& path) const;
  Status Find(const char* operation, const std::string& path, std::shared_ptr<Node>* node) const;
  bool HasChildren(const std::string& path) const;

  const std::shared_ptr<Disk> disk_;
};

}  // namespace layerwise

#endif  // LAYERWISE_MOCK_ENV_H_
