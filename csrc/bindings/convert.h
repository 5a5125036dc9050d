// SPDX-License-Identifier: Apache-2.0
#ifndef LAYERWISE_BINDINGS_CONVERT_H_
#define LAYERWISE_BINDINGS_CONVERT_H_

#include <nanobind/nanobind.h>

#include <exception>
#include <string>
#include <string_view>
#include <utility>

#include "layerwise/status.h"

namespace layerwise {

namespace nb = nanobind;

// Carries a Status out of a binding, where MakeException turns it into Python's.
class StatusError : public std::exception {
 public:
  explicit StatusError(Status status) : status_(std::move(status)) {}
  const char* what() const noexcept override { return status_.message().c_str(); }
  const Status& status() const { return status_; }

 private:
  Status status_;
};

// The exception object for a failed Status: OSError(errno, message, path), which
// Python narrows to FileNotFoundError and the like, ValueError or RuntimeError.
nb::object MakeException(const Status& status);

// Raises that for a StatusError, for nb::register_exception_translator.
void TranslateStatus(const std::exception_ptr& pointer, void*);

inline void Check(const Status& status) {
  if (!status.ok()) throw StatusError(status);
}

// Lets go of the GIL while it lives. A thread that comes back when the interpreter is
// ending stays here for good: CPython would end it by unwinding its stack, which takes
// the process down where a frame does not let that pass.
class Unheld {
 public:
  Unheld() : state_(PyEval_SaveThread()) {}
  ~Unheld();
  Unheld(const Unheld&) = delete;
  Unheld& operator=(const Unheld&) = delete;

 private:
  PyThreadState* const state_;
};

// Runs f, which returns a Status, without the GIL.
template <typename F>
void Unlocked(F&& f) {
  Status status;
  {
    const Unheld unheld;
    status = f();
  }
  Check(status);
}

// Calls wait(seconds), without the GIL, until it returns true or the time is up; in
// slices, so that a signal's handler can raise. Whether it returned true.
template <typename F>
bool InSlices(double timeout_s, F&& wait) {
  constexpr double kSlice = 0.1;
  double left = timeout_s > 0 ? timeout_s : 0;
  for (;;) {
    bool done;
    {
      const Unheld unheld;
      done = wait(left < kSlice ? left : kSlice);
    }
    if (done) return true;
    left -= kSlice;
    if (left <= 0) return false;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

// str with undecodable bytes escaped, as os.fsdecode does.
nb::object DecodePath(const std::string& path);

inline nb::bytes ToBytes(const std::string& data) { return nb::bytes(data.data(), data.size()); }

// The contiguous bytes of any object with the buffer protocol. TypeError or
// BufferError if it has none. REQUIRES: made and destroyed with the GIL.
class BufferView {
 public:
  explicit BufferView(nb::handle object);
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  const void* data() const { return view_.buf; }
  size_t size() const { return static_cast<size_t>(view_.len); }
  std::string_view view() const { return {static_cast<const char*>(view_.buf), size()}; }

 private:
  Py_buffer view_;
};

void BindBuffers(nb::module_& m);
void BindEnv(nb::module_& m);
void BindHashes(nb::module_& m);
void BindObjects(nb::module_& m);
void BindShard(nb::module_& m);
void BindTensors(nb::module_& m);

}  // namespace layerwise

#endif  // LAYERWISE_BINDINGS_CONVERT_H_
