// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_SRC_PIECES_H_
#define LAYERWISE_SRC_PIECES_H_

#include <sys/uio.h>

#include <cstddef>
#include <vector>

namespace layerwise {

// What is left of a vectored write. Threads: external synchronization.
class Pieces {
 public:
  Pieces() = default;
  Pieces(const iovec* pieces, size_t count) { Assign(pieces, count); }

  void Assign(const iovec* pieces, size_t count) {
    pieces_.assign(pieces, pieces + count);
    next_ = 0;
    bytes_ = 0;
    for (const iovec& piece : pieces_) bytes_ += piece.iov_len;
  }

  // The first n bytes have been written. REQUIRES: n <= bytes().
  void Drop(size_t n) {
    bytes_ -= n;
    while (next_ < pieces_.size() && n >= pieces_[next_].iov_len) n -= pieces_[next_++].iov_len;
    if (n == 0) return;
    pieces_[next_].iov_base = static_cast<char*>(pieces_[next_].iov_base) + n;
    pieces_[next_].iov_len -= n;
  }

  bool empty() const { return bytes_ == 0; }
  size_t bytes() const { return bytes_; }
  const iovec* data() const { return pieces_.data() + next_; }
  int count() const { return static_cast<int>(pieces_.size() - next_); }

 private:
  std::vector<iovec> pieces_;
  size_t next_ = 0;
  size_t bytes_ = 0;
};

}  // namespace layerwise

#endif  // LAYERWISE_SRC_PIECES_H_
