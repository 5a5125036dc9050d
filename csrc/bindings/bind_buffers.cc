// SPDX-License-Identifier: Apache-2.0
#include "bind_buffers.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "convert.h"
#include "layerwise/memory_hold.h"

namespace layerwise {

namespace {

void InitBuffers(PyBuffers* self, int64_t nbytes) {
  if (nbytes < 0) throw StatusError(Status::InvalidArgument(std::to_string(nbytes) + " is negative"));
  std::shared_ptr<BufferPool> pool;
  Check(BufferPool::Create(static_cast<size_t>(nbytes), &pool));
  new (self) PyBuffers{std::move(pool)};
}

nb::object Wrapped(PyBuffers& buffers, BufferPool::Buffer memory) {
  auto made = std::make_unique<PyBuffer>();
  made->pool = buffers.it;
  made->it = std::move(memory);
  return nb::cast(made.release(), nb::rv_policy::take_ownership);
}

uint64_t Unsigned(int64_t value) {
  if (value < 0) throw StatusError(Status::InvalidArgument(std::to_string(value) + " is negative"));
  return static_cast<uint64_t>(value);
}

nb::tuple Shared(int file, int64_t nbytes) {
  auto made = std::make_unique<PyBuffers>();
  uint64_t begin = 0;
  const uint64_t n = Unsigned(nbytes);
  Unlocked([&] { return BufferPool::CreateShared(file, n, &begin, &made->it); });
  return nb::make_tuple(nb::cast(made.release(), nb::rv_policy::take_ownership), begin);
}

PyBuffers* Attached(int file, int64_t begin, int64_t nbytes, int wake) {
  auto made = std::make_unique<PyBuffers>();
  Check(BufferPool::Attach(file, Unsigned(begin), Unsigned(nbytes), wake, &made->it));
  return made.release();
}

nb::object Adopt(PyBuffers& buffers, int64_t place, int64_t nbytes) {
  BufferPool::Buffer memory;
  Check(buffers.it->Adopt(Unsigned(place), Unsigned(nbytes), &memory));
  return Wrapped(buffers, std::move(memory));
}

nb::object Acquire(PyBuffers& buffers, int64_t nbytes, double timeout_s) {
  if (nbytes < 1) throw StatusError(Status::InvalidArgument("a buffer of " + std::to_string(nbytes) + " bytes"));
  const size_t n = static_cast<size_t>(nbytes);
  BufferPool::Buffer memory;
  // What can never fit is not waited for.
  const double wait = n > buffers.it->capacity() ? 0 : timeout_s;
  InSlices(wait, [&](double slice) {
    memory = buffers.it->Acquire(n, slice);
    return static_cast<bool>(memory);
  });
  if (!memory) return nb::none();
  return Wrapped(buffers, std::move(memory));
}

uintptr_t Address(PyBuffer& buffer) {
  if (!buffer.it) throw StatusError(Status::FailedPrecondition("the address of a released buffer"));
  return reinterpret_cast<uintptr_t>(buffer.it.data());
}

void Release(PyBuffer& buffer) {
  if (buffer.views > 0) throw nb::buffer_error("release of a buffer that a view of it still uses");
  buffer.it.Release();
}

int GetView(PyObject* object, Py_buffer* view, int flags) {
  PyBuffer* const buffer = nb::inst_ptr<PyBuffer>(object);
  if (!buffer->it) {
    PyErr_SetString(PyExc_BufferError, "the buffer was released");
    view->obj = nullptr;
    return -1;
  }
  const auto size = static_cast<Py_ssize_t>(buffer->it.size());
  if (PyBuffer_FillInfo(view, object, buffer->it.data(), size, 0, flags) != 0) return -1;
  buffer->views += 1;
  return 0;
}

void DropView(PyObject* object, Py_buffer*) { nb::inst_ptr<PyBuffer>(object)->views -= 1; }

struct PyHold {
  std::unique_ptr<MemoryHold> it;
};

// REQUIRES: the GIL, under which torch changes who owns what.
void InitHold(PyHold* self, const std::vector<std::pair<uintptr_t, uintptr_t>>& owners) {
  std::vector<MemoryHold::Claim> claims;
  claims.reserve(owners.size());
  for (const auto& [owner, data] : owners) {
    if (owner == 0) throw StatusError(Status::InvalidArgument("a hold on an owner at address 0"));
    claims.push_back({reinterpret_cast<MemoryHold::Owner*>(owner), data});
  }
  std::unique_ptr<MemoryHold> hold;
  Check(MemoryHold::Take(claims, &hold));
  new (self) PyHold{std::move(hold)};
}

PyType_Slot buffer_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(GetView)},
                              {Py_bf_releasebuffer, reinterpret_cast<void*>(DropView)},
                              {0, nullptr}};

}  // namespace

void BindBuffers(nb::module_& m) {
  nb::class_<PyBuffer>(m, "PoolBuffer", nb::type_slots(buffer_slots))
      .def_prop_ro("address", &Address)
      .def_prop_ro("place",
                   [](PyBuffer& buffer) {
                     if (!buffer.it) {
                       throw StatusError(Status::FailedPrecondition("the place of a released buffer"));
                     }
                     return buffer.it.place();
                   })
      .def_prop_ro("nbytes", [](PyBuffer& buffer) { return buffer.it.size(); })
      .def("release", &Release);

  nb::class_<PyHold>(m, "MemoryHold")
      .def("__init__", &InitHold, nb::arg("owners"))
      .def_prop_ro_static("deleter",
                          [](nb::handle) { return reinterpret_cast<uintptr_t>(MemoryHold::deleter()); })
      .def_prop_ro_static("orphans", [](nb::handle) { return MemoryHold::orphans(); });

  nb::class_<PyBuffers>(m, "BufferPool")
      .def("__init__", &InitBuffers, nb::arg("nbytes"))
      .def_static("shared", &Shared, nb::arg("file"), nb::arg("nbytes"))
      .def_static("attached", &Attached, nb::arg("file"), nb::arg("begin"), nb::arg("nbytes"), nb::arg("wake"),
                  nb::rv_policy::take_ownership)
      .def("adopt", &Adopt, nb::arg("place"), nb::arg("nbytes"))
      .def("take_returned", [](PyBuffers& buffers) { return buffers.it->TakeReturned(); })
      .def("acquire", &Acquire, nb::arg("nbytes"), nb::arg("timeout_s"))
      .def_prop_ro("capacity", [](PyBuffers& buffers) { return buffers.it->capacity(); })
      .def_prop_ro("in_use", [](PyBuffers& buffers) { return buffers.it->in_use(); })
      .def_prop_ro("peak", [](PyBuffers& buffers) { return buffers.it->peak(); });
}

}  // namespace layerwise
