// SPDX-License-Identifier: Apache-2.0
#include "layerwise/status.h"

#include <cerrno>
#include <system_error>
#include <utility>

namespace layerwise {

namespace {

const std::string kOkMessage = "OK";
const std::string kNoPath;
// Never destroyed: threads may outlive the destruction of statics at exit.
const Status& kNoMemory = *new Status(Status::IoError(ENOMEM, "allocate memory", ""));

}  // namespace

Status Status::IoError(int error_number, std::string_view operation, std::string_view path) {
  std::string message(operation);
  message += ": ";
  message += std::generic_category().message(error_number);
  return Status(Rep{Code::kIoError, error_number, std::move(message), std::string(path)});
}

Status Status::NoMemory() { return kNoMemory; }

Status Status::InvalidArgument(std::string message) {
  return Status(Rep{Code::kInvalidArgument, 0, std::move(message), {}});
}

Status Status::FailedPrecondition(std::string message) {
  return Status(Rep{Code::kFailedPrecondition, 0, std::move(message), {}});
}

const std::string& Status::message() const { return ok() ? kOkMessage : rep_->message; }

const std::string& Status::path() const { return ok() ? kNoPath : rep_->path; }

std::string Status::ToString() const {
  return path().empty() ? message() : message() + ": " + path();
}

}  // namespace layerwise
