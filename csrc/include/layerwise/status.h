// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_STATUS_H_
#define LAYERWISE_STATUS_H_

#include <memory>
#include <string>
#include <string_view>

namespace layerwise {

// The result of an operation: success, or what failed, where, and the errno.
//
// A Status is a value: it may be copied between threads, and a const Status may
// be read by several threads at once.
class [[nodiscard]] Status {
 public:
  enum class Code {
    kOk,
    kIoError,             // the operating system said no; error_number() is its errno
    kInvalidArgument,     // the caller's values contradict the contract
    kFailedPrecondition,  // the call came in the wrong state
  };

  Status() = default;
  static Status Ok() { return Status(); }

  // "<operation>: <text of errno>"; the path is kept beside the message.
  static Status IoError(int error_number, std::string_view operation, std::string_view path);
  // ENOMEM, without a path. Needs no memory itself.
  static Status NoMemory();
  static Status InvalidArgument(std::string message);
  static Status FailedPrecondition(std::string message);

  bool ok() const { return rep_ == nullptr; }
  Code code() const { return rep_ == nullptr ? Code::kOk : rep_->code; }
  // 0 unless code() is kIoError.
  int error_number() const { return rep_ == nullptr ? 0 : rep_->error_number; }
  const std::string& message() const;
  // Empty unless code() is kIoError.
  const std::string& path() const;
  // "OK", or "<message>: <path>".
  std::string ToString() const;

 private:
  struct Rep {
    Code code;
    int error_number;
    std::string message;
    std::string path;
  };

  explicit Status(Rep rep) : rep_(std::make_shared<const Rep>(std::move(rep))) {}

  std::shared_ptr<const Rep> rep_;
};

}  // namespace layerwise

#endif  // LAYERWISE_STATUS_H_
