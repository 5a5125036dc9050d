// SPDX-License-Identifier: Apache-2.0
#include "layerwise/status.h"

#include <cerrno>

#include "scratch.h"

namespace layerwise {

TEST_CASE("a status says what failed, where and why") {
  CHECK(Status().ok());
  CHECK(Status().ToString() == "OK");
  const Status status = Status::IoError(ENOENT, "open", "/a/b");
  CHECK(!status.ok());
  CHECK(status.code() == Status::Code::kIoError);
  CHECK(status.error_number() == ENOENT);
  CHECK(status.message() == "open: No such file or directory");
  CHECK(status.path() == "/a/b");
  CHECK(status.ToString() == "open: No such file or directory: /a/b");
}

TEST_CASE("a status that is no I/O error has no errno and no path") {
  const Status status = Status::InvalidArgument("3 is odd");
  CHECK(status.code() == Status::Code::kInvalidArgument);
  CHECK(status.error_number() == 0);
  CHECK(status.ToString() == "3 is odd");
  CHECK(Status::FailedPrecondition("late").code() == Status::Code::kFailedPrecondition);
}

}  // namespace layerwise
