// SPDX-License-Identifier: Apache-2.0
// Words of torch's tensors, read where Python has found them (layerwise_dist/tensors/words.py).
#include <cstdint>
#include <cstring>
#include <vector>

#include "convert.h"

namespace layerwise {

namespace {

// How many objects ahead of the present one memory is asked for. After a training step none of
// it is in the cache, and one miss after the other is what the same questions in Python take.
constexpr size_t kAhead = 16;

// Offsets in bytes. `impl`, in the Python object, leads to torch's own tensor, which has the rest:
// `counter` leads to the version, at `version`; `storage` to the storage, which has the memory's
// address at `address`; `offset` is the number of the first element in it.
struct Offsets {
  size_t impl, counter, version, storage, address, offset;
};

template <typename T>
T Read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

class TensorWords {
 public:
  TensorWords(nb::handle kind, const Offsets& offsets) : kind_(nb::borrow(kind)), offsets_(offsets) {
    if (!PyType_Check(kind.ptr())) throw StatusError(Status::InvalidArgument("the class of tensors is expected"));
  }

  // A word each. None if one of them is no tensor or has no version.
  nb::object Versions(const nb::list& tensors) const {
    std::vector<const char*> at;
    if (!Impls(tensors, &at)) return nb::none();
    std::vector<uint64_t> found(at.size());
    if (!Follow(offsets_.counter, offsets_.version, &at)) return nb::none();
    for (size_t i = 0; i < at.size(); ++i) found[i] = Read<uint32_t>(at[i] + offsets_.version);
    return ToWords(found);
  }

  // Three words each: the storage, where its memory is, and the first element. None if one of them
  // is no tensor or has no storage.
  nb::object Places(const nb::list& tensors) const {
    std::vector<const char*> at;
    if (!Impls(tensors, &at)) return nb::none();
    std::vector<uint64_t> found(3 * at.size());
    for (size_t i = 0; i < at.size(); ++i) found[3 * i + 2] = Read<uint64_t>(at[i] + offsets_.offset);
    if (!Follow(offsets_.storage, offsets_.address, &at)) return nb::none();
    for (size_t i = 0; i < at.size(); ++i) {
      found[3 * i] = reinterpret_cast<uintptr_t>(at[i]);
      found[3 * i + 1] = Read<uint64_t>(at[i] + offsets_.address);
    }
    return ToWords(found);
  }

 private:
  static nb::object ToWords(const std::vector<uint64_t>& words) {
    return nb::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint64_t));
  }

  // Torch's own tensors of these objects. False if one has none.
  bool Impls(const nb::list& tensors, std::vector<const char*>* impls) const {
    auto* const kind = reinterpret_cast<PyTypeObject*>(kind_.ptr());
    const size_t n = tensors.size();
    const auto object = [&tensors](size_t i) { return PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)); };
    impls->resize(n);
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) __builtin_prefetch(object(i + kAhead));
      if (!PyObject_TypeCheck(object(i), kind)) return false;
      const char* const impl = Read<const char*>(reinterpret_cast<const char*>(object(i)) + offsets_.impl);
      if (impl == nullptr) return false;
      __builtin_prefetch(impl + offsets_.counter);
      __builtin_prefetch(impl + offsets_.offset);
      (*impls)[i] = impl;
    }
    return true;
  }

  // From each of `at` to where the pointer at `pointer` leads. False if one leads nowhere. `next` will be read there.
  static bool Follow(size_t pointer, size_t next, std::vector<const char*>* at) {
    for (const char*& each : *at) {
      each = Read<const char*>(each + pointer);
      if (each == nullptr) return false;
      __builtin_prefetch(each + next);
    }
    return true;
  }

  nb::object kind_;
  Offsets offsets_;
};

}  // namespace

void BindTensors(nb::module_& m) {
  nb::class_<TensorWords>(m, "TensorWords")
      .def(
          "__init__",
          [](TensorWords* self, nb::handle kind, size_t impl, size_t counter, size_t version, size_t storage,
             size_t address, size_t offset) {
            new (self) TensorWords(kind, {impl, counter, version, storage, address, offset});
          },
          nb::arg("kind"), nb::kw_only(), nb::arg("impl"), nb::arg("counter"), nb::arg("version"),
          nb::arg("storage"), nb::arg("address"), nb::arg("offset"))
      .def("versions", &TensorWords::Versions, nb::arg("tensors"))
      .def("places", &TensorWords::Places, nb::arg("tensors"));
}

}  // namespace layerwise
