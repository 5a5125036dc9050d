// SPDX-License-Identifier: Apache-2.0
#include "convert.h"

#include <cxxabi.h>
#include <unistd.h>

namespace layerwise {

Unheld::~Unheld() {
  try {
    PyEval_RestoreThread(state_);
  } catch (const abi::__forced_unwind&) {
    for (;;) pause();
  }
}

nb::object DecodePath(const std::string& path) {
  return nb::steal(PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

nb::object MakeException(const Status& status) {
  nb::object message = DecodePath(status.message());
  switch (status.code()) {
    case Status::Code::kIoError:
      if (status.path().empty()) return nb::handle(PyExc_OSError)(status.error_number(), message);
      return nb::handle(PyExc_OSError)(status.error_number(), message, DecodePath(status.path()));
    case Status::Code::kInvalidArgument:
      return nb::handle(PyExc_ValueError)(message);
    default:
      return nb::handle(PyExc_RuntimeError)(message);
  }
}

void TranslateStatus(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const StatusError& error) {
    nb::object exception = MakeException(error.status());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  }
}

BufferView::BufferView(nb::handle object) {
  if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
}

}  // namespace layerwise
