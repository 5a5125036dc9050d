// SPDX-License-Identifier: Apache-2.0
#include "nvm_file.h"

#include <fcntl.h>
#include <linux/mman.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "durable_store.h"
#include "layerwise/aligned_buffer.h"

namespace layerwise {

namespace {

// Address space taken at once: small writes at the end must not map each.
constexpr uint64_t kLeastSegment = 64 << 20;

struct ThisCpu {
#if defined(__SSE2__)
  void Copy(char* out, const char* in, size_t n) { std::memcpy(out, in, n); }
  void Flush(const char* at) { _mm_clflush(at); }
  void Stream(char* out, const char* in) {
    const auto* const from = reinterpret_cast<const __m128i*>(in);
    auto* const to = reinterpret_cast<__m128i*>(out);
    for (int i = 0; i < 4; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
  }
  void Fence() { _mm_sfence(); }
#else
  // The kernel writes these lines back in fdatasync.
  void Copy(char* out, const char* in, size_t n) { std::memcpy(out, in, n); }
  void Flush(const char*) {}
  void Stream(char* out, const char* in) { std::memcpy(out, in, kCacheLine); }
  void Fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
#endif
};

}  // namespace

uint64_t NvmWritableFile::mapped() const {
  return segments_.empty() ? 0 : segments_.back().offset + segments_.back().length;
}

Status NvmWritableFile::Map(uint64_t end) {
  const uint64_t begin = mapped();
  if (end <= begin) return Status::Ok();
  const uint64_t length = RoundUp(std::max(end - begin, kLeastSegment), kLeastSegment);
  void* const base = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd_.get(),
                          static_cast<off_t>(begin));
  if (base == MAP_FAILED) {
    const bool refused = errno == EOPNOTSUPP || errno == EINVAL || errno == ENODEV;
    return refused ? Status::IoError(EOPNOTSUPP, "no DAX here: map with MAP_SYNC", path_) : PosixError("mmap", path_);
  }
  static_cast<void>(madvise(base, length, MADV_DONTFORK));  // children would hold the space of a removed file
  segments_.push_back({begin, length, static_cast<char*>(base)});
  return Status::Ok();
}

Status NvmWritableFile::Reserve(uint64_t end) {
  if (!fd_.valid()) return Status::IoError(EBADF, "write", path_);
  if (end <= reserved_) return Status::Ok();
  int result;
  do {
    result = fallocate(fd_.get(), 0, static_cast<off_t>(reserved_), static_cast<off_t>(end - reserved_));
  } while (result != 0 && errno == EINTR);
  if (result != 0) return PosixError("fallocate", path_);
  reserved_ = end;
  return Map(end);
}

Status NvmWritableFile::Open() {
  std::lock_guard lock(mutex_);
  return Map(1);
}

Status NvmWritableFile::Pwrite(const void* data, size_t n, uint64_t offset) {
  if (!FitsKernel(n, offset)) return Status::IoError(EFBIG, "write", path_);
  const char* in = static_cast<const char*>(data);
  while (n > 0) {
    char* out = nullptr;
    size_t length = 0;
    {
      std::lock_guard lock(mutex_);
      Status status = Reserve(offset + n);
      if (!status.ok()) return status;
      const auto after = std::upper_bound(segments_.begin(), segments_.end(), offset,
                                          [](uint64_t at, const Segment& s) { return at < s.offset; });
      const Segment& segment = *std::prev(after);
      out = segment.base + (offset - segment.offset);
      length = std::min<uint64_t>(n, segment.offset + segment.length - offset);
    }
    StoreDurably(ThisCpu(), out, in, length);
    in += length;
    n -= length;
    offset += length;
  }
  return Status::Ok();
}

Status NvmWritableFile::Allocate(uint64_t size) {
  if (!FitsKernel(size, 0)) return Status::IoError(EFBIG, "fallocate", path_);
  std::lock_guard lock(mutex_);
  return Reserve(size);
}

Status NvmWritableFile::Truncate(uint64_t size) {
  Status status = TruncateTo(fd_.get(), size, path_);
  if (status.ok()) reserved_ = std::min(reserved_, size);
  return status;
}

Status NvmWritableFile::Sync() {
  if (poisoned_) return Status::IoError(EIO, "fdatasync after a failed one", path_);
  if (fdatasync(fd_.get()) == 0) return Status::Ok();
  poisoned_ = true;
  return PosixError("fdatasync", path_);
}

Status NvmWritableFile::Close() {
  if (fd_.valid()) {  // a forked child does not have the mappings, and may have something else there
    for (const Segment& segment : segments_) munmap(segment.base, segment.length);
  }
  segments_.clear();
  return fd_.Close(path_);
}

}  // namespace layerwise
