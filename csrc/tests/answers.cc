// SPDX-License-Identifier: Apache-2.0
#include "answers.h"

#include <dirent.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/mman.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace layerwise {

struct Answered::Rule {
  std::string call;
  int error = 0;
  int times = 0;
  int after = 0;
  std::function<void()> meanwhile;
  int given = 0;
};

namespace {

std::atomic<int> rules_there{0};  // so that calls cost nothing while there are none
std::atomic<int> as_on_dax{0};
thread_local long memory_left = -1;  // -1: enough
thread_local bool memory_short = false;

struct Rules {
  std::mutex mutex;
  std::vector<Answered::Rule*> all;
};

// Never destroyed: calls are made during exit too.
Rules& Known() {
  static auto* const rules = new Rules;
  return *rules;
}

}  // namespace

int AnswerTo(const char* call) {
  if (rules_there == 0) return 0;
  std::function<void()> meanwhile;
  {
    std::lock_guard lock(Known().mutex);
    for (Answered::Rule* const rule : Known().all) {
      if (rule->call != call || rule->given == rule->times) continue;
      if (rule->after > 0) {
        rule->after -= 1;
        continue;
      }
      rule->given += 1;
      if (!rule->meanwhile) return rule->error;
      meanwhile = rule->meanwhile;
      break;
    }
  }
  if (meanwhile) meanwhile();  // may make such calls itself
  return 0;
}

namespace {

bool Refused(const char* call) {
  const int error = AnswerTo(call);
  if (error != 0) errno = error;
  return error != 0;
}

// Of n bytes; SIZE_MAX if the call fails.
size_t Share(const char* call, size_t n) {
  const int error = AnswerTo(call);
  if (error == 0) return n;
  if (error == kNothing) return 0;
  if (error == kHalf) return n / 2 / 512 * 512;
  errno = error;
  return SIZE_MAX;
}

void* Allocate(size_t n, void* (*real)(size_t)) {
  if (memory_left == 0) {
    memory_left = -1;
    memory_short = true;
    throw std::bad_alloc();
  }
  if (memory_left > 0) memory_left -= 1;
  return real(n);
}

}  // namespace

Answered::Answered(const std::string& call, int error, int times, int after)
    : rule_(new Rule{call, error, times, after, nullptr, 0}) {
  std::lock_guard lock(Known().mutex);
  Known().all.push_back(rule_.get());
  rules_there += 1;
}

Answered::Answered(const std::string& call, std::function<void()> meanwhile, int after)
    : rule_(new Rule{call, 0, 1, after, std::move(meanwhile), 0}) {
  std::lock_guard lock(Known().mutex);
  Known().all.push_back(rule_.get());
  rules_there += 1;
}

Answered::~Answered() {
  {
    std::lock_guard lock(Known().mutex);
    std::erase(Known().all, rule_.get());
    rules_there -= 1;
  }
  CHECK_MESSAGE(rule_->given > 0, "nobody called ", rule_->call);
}

int Answered::times() const {
  std::lock_guard lock(Known().mutex);
  return rule_->given;
}

AsOnDax::AsOnDax() { as_on_dax += 1; }
AsOnDax::~AsOnDax() { as_on_dax -= 1; }

ShortOfMemory::ShortOfMemory(long left) {
  memory_short = false;
  memory_left = left;
}
ShortOfMemory::~ShortOfMemory() { memory_left = -1; }
bool ShortOfMemory::met() const { return memory_short; }

NoThreads::NoThreads() {
  pthread_attr_t attributes;
  REQUIRE(pthread_getattr_default_np(&attributes) == 0);
  REQUIRE(pthread_attr_getstacksize(&attributes, &before_) == 0);
  REQUIRE(pthread_attr_setstacksize(&attributes, size_t{1} << 47) == 0);
  REQUIRE(pthread_setattr_default_np(&attributes) == 0);
  pthread_attr_destroy(&attributes);
}

NoThreads::~NoThreads() {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, before_);
  CHECK(pthread_setattr_default_np(&attributes) == 0);
  pthread_attr_destroy(&attributes);
}

}  // namespace layerwise

extern "C" void __gcov_dump() __attribute__((weak));

namespace layerwise {

void Leave(int status) {
  if (__gcov_dump != nullptr) __gcov_dump();
  _exit(status);
}

}  // namespace layerwise

using layerwise::AnswerTo;
using layerwise::Refused;
using layerwise::Share;

extern "C" {

#define LAYERWISE_WRAP(result, failed, name, parameters, arguments) \
  result __real_##name parameters;                                  \
  result __wrap_##name parameters;                                  \
  result __wrap_##name parameters { return Refused(#name) ? failed : __real_##name arguments; }

LAYERWISE_WRAP(void*, nullptr, aligned_alloc, (size_t alignment, size_t n), (alignment, n))
LAYERWISE_WRAP(int, -1, chmod, (const char* path, mode_t mode), (path, mode))
LAYERWISE_WRAP(int, -1, eventfd, (unsigned count, int flags), (count, flags))
LAYERWISE_WRAP(int, -1, fallocate, (int fd, int mode, off_t offset, off_t n), (fd, mode, offset, n))
LAYERWISE_WRAP(int, -1, fchmod, (int fd, mode_t mode), (fd, mode))
LAYERWISE_WRAP(int, -1, fdatasync, (int fd), (fd))
LAYERWISE_WRAP(DIR*, nullptr, fdopendir, (int fd), (fd))
LAYERWISE_WRAP(int, -1, fstat, (int fd, struct stat* info), (fd, info))
LAYERWISE_WRAP(int, -1, fstatat, (int dir, const char* name, struct stat* info, int flags), (dir, name, info, flags))
LAYERWISE_WRAP(int, -1, fstatfs, (int fd, struct statfs* info), (fd, info))
LAYERWISE_WRAP(int, -1, fsync, (int fd), (fd))
LAYERWISE_WRAP(int, -1, ftruncate, (int fd, off_t size), (fd, size))
LAYERWISE_WRAP(int, -1, mincore, (void* at, size_t n, unsigned char* there), (at, n, there))
LAYERWISE_WRAP(int, -1, mkdirat, (int dir, const char* name, mode_t mode), (dir, name, mode))
LAYERWISE_WRAP(DIR*, nullptr, opendir, (const char* path), (path))
LAYERWISE_WRAP(ssize_t, -1, process_vm_readv,
               (pid_t process, const iovec* to, unsigned long to_count, const iovec* from, unsigned long from_count,
                unsigned long flags),
               (process, to, to_count, from, from_count, flags))
LAYERWISE_WRAP(dirent*, nullptr, readdir, (DIR* dir), (dir))
LAYERWISE_WRAP(ssize_t, -1, readlinkat, (int dir, const char* name, char* target, size_t n), (dir, name, target, n))
LAYERWISE_WRAP(int, -1, renameat, (int dir, const char* from, int to_dir, const char* to), (dir, from, to_dir, to))
LAYERWISE_WRAP(int, -1, renameat2, (int dir, const char* from, int to_dir, const char* to, unsigned flags),
               (dir, from, to_dir, to, flags))
LAYERWISE_WRAP(int, -1, sigaction, (int number, const struct sigaction* to, struct sigaction* was), (number, to, was))
LAYERWISE_WRAP(int, -1, unlinkat, (int dir, const char* name, int flags), (dir, name, flags))

int __real_close(int fd);
int __wrap_close(int fd);
int __wrap_close(int fd) {
  const int result = __real_close(fd);
  return Refused("close") ? -1 : result;
}

// The answer is an alignment (of memory: error & 0xFFFF, of offsets: error >> 16), or an errno below 512.
int __real_statx(int dir, const char* path, int flags, unsigned mask, struct statx* info);
int __wrap_statx(int dir, const char* path, int flags, unsigned mask, struct statx* info);
int __wrap_statx(int dir, const char* path, int flags, unsigned mask, struct statx* info) {
  const int said = AnswerTo("statx");
  if (said > 0 && said < 512) {
    errno = said;
    return -1;
  }
  const int result = __real_statx(dir, path, flags, mask, info);
  if (said == 0) return result;
#if defined(STATX_DIOALIGN)
  info->stx_mask |= STATX_DIOALIGN;
  info->stx_dio_mem_align = static_cast<uint32_t>(said) & 0xFFFF;
  info->stx_dio_offset_align = static_cast<uint32_t>(said) >> 16;
#endif
  return 0;
}

ssize_t __real_pwrite(int fd, const void* data, size_t n, off_t offset);
ssize_t __wrap_pwrite(int fd, const void* data, size_t n, off_t offset);
ssize_t __wrap_pwrite(int fd, const void* data, size_t n, off_t offset) {
  const size_t share = Share("pwrite", n);
  if (share == SIZE_MAX) return -1;
  return share == 0 ? 0 : __real_pwrite(fd, data, share, offset);
}

ssize_t __real_pread(int fd, void* data, size_t n, off_t offset);
ssize_t __wrap_pread(int fd, void* data, size_t n, off_t offset);
ssize_t __wrap_pread(int fd, void* data, size_t n, off_t offset) {
  const size_t share = Share("pread", n);
  if (share == SIZE_MAX) return -1;
  return share == 0 ? 0 : __real_pread(fd, data, share, offset);
}

// Half of it is half of the first piece.
ssize_t __real_pwritev(int fd, const iovec* pieces, int count, off_t offset);
ssize_t __wrap_pwritev(int fd, const iovec* pieces, int count, off_t offset);
ssize_t __wrap_pwritev(int fd, const iovec* pieces, int count, off_t offset) {
  const size_t share = Share("pwritev", pieces[0].iov_len);
  if (share == SIZE_MAX) return -1;
  if (share == pieces[0].iov_len) return __real_pwritev(fd, pieces, count, offset);
  return share == 0 ? 0 : __real_pwrite(fd, pieces[0].iov_base, share, offset);
}

int __real_openat(int dir, const char* name, int flags, ...);
int __wrap_openat(int dir, const char* name, int flags, ...);
int __wrap_openat(int dir, const char* name, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return Refused("openat") ? -1 : __real_openat(dir, name, flags, mode);
}

int __real_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...) {
  va_list rest;
  va_start(rest, command);
  void* const argument = va_arg(rest, void*);  // or a number, or none: the kernel too takes a word
  va_end(rest);
  const std::pair<int, const char*> names[] = {
      {F_GETFL, "F_GETFL"},   {F_SETFL, "F_SETFL"},           {F_GETLEASE, "F_GETLEASE"},
      {F_SETLEASE, "F_SETLEASE"}, {F_SETOWN_EX, "F_SETOWN_EX"}, {F_OFD_SETLK, "F_OFD_SETLK"}};
  for (const auto& [number, name] : names) {
    if (number == command && Refused(name)) return -1;
  }
  return __real_fcntl(fd, command, argument);
}

void* __real_mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset);
void* __wrap_mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset);
void* __wrap_mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset) {
  if (Refused("mmap")) return MAP_FAILED;
  if ((flags & MAP_SYNC) != 0 && layerwise::as_on_dax > 0) flags = MAP_SHARED;
  return __real_mmap(at, n, protection, flags, fd, offset);
}

int __real_madvise(void* at, size_t n, int advice);
int __wrap_madvise(void* at, size_t n, int advice);
int __wrap_madvise(void* at, size_t n, int advice) {
  const char* const name = advice == MADV_DONTFORK ? "MADV_DONTFORK" : advice == 25 ? "MADV_COLLAPSE" : "madvise";
  return Refused(name) ? -1 : __real_madvise(at, n, advice);
}

int __real_io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags);
int __wrap_io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags);
int __wrap_io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) {
  const int error = AnswerTo("io_uring_queue_init");
  return error != 0 ? -error : __real_io_uring_queue_init(entries, ring, flags);
}

// The answer kNothing is no probe, any other one a probe that knows no operation from that number on.
io_uring_probe* __real_io_uring_get_probe_ring(io_uring* ring);
io_uring_probe* __wrap_io_uring_get_probe_ring(io_uring* ring);
io_uring_probe* __wrap_io_uring_get_probe_ring(io_uring* ring) {
  const int said = AnswerTo("io_uring_get_probe_ring");
  if (said == layerwise::kNothing) return nullptr;
  io_uring_probe* const probe = __real_io_uring_get_probe_ring(ring);
  if (said != 0 && probe != nullptr) probe->last_op = static_cast<uint8_t>(said - 1);
  return probe;
}

int __real___io_uring_get_cqe(io_uring* ring, io_uring_cqe** cqe, unsigned submit, unsigned wait, sigset_t* mask);
int __wrap___io_uring_get_cqe(io_uring* ring, io_uring_cqe** cqe, unsigned submit, unsigned wait, sigset_t* mask);
int __wrap___io_uring_get_cqe(io_uring* ring, io_uring_cqe** cqe, unsigned submit, unsigned wait, sigset_t* mask) {
  const int error = wait > 0 ? AnswerTo("io_uring_wait_cqe") : 0;
  return error != 0 ? -error : __real___io_uring_get_cqe(ring, cqe, submit, wait, mask);
}

// operator new and new[]
void* __real__Znwm(size_t n);
void* __wrap__Znwm(size_t n);
void* __wrap__Znwm(size_t n) { return layerwise::Allocate(n, __real__Znwm); }
void* __real__Znam(size_t n);
void* __wrap__Znam(size_t n);
void* __wrap__Znam(size_t n) { return layerwise::Allocate(n, __real__Znam); }
}
