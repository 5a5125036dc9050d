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
// address at `address`; in the word at `references` the holders are counted. What says where a
// tensor's elements are is in its first `inside` bytes.
struct Offsets {
  size_t impl, counter, version, storage, address, references, inside;
};

constexpr size_t kMostInside = 256;
constexpr size_t kLine = 64;

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
    if (offsets.inside > kMostInside || offsets.inside < offsets.references + sizeof(uint64_t)) {
      throw StatusError(Status::InvalidArgument("a tensor's insides have the count of holders, and 256 bytes at most"));
    }
  }

  // A word each. None if one of them is no tensor or has no version.
  nb::object Versions(const nb::list& tensors) const {
    std::vector<const char*> at;
    if (!Impls(tensors, [this](const char* impl) { __builtin_prefetch(impl + offsets_.counter); }, &at)) {
      return nb::none();
    }
    std::vector<uint64_t> found(at.size());
    if (!Follow(offsets_.counter, offsets_.version, &at)) return nb::none();
    for (size_t i = 0; i < at.size(); ++i) found[i] = Read<uint32_t>(at[i] + offsets_.version);
    return ToWords(found);
  }

  // The first words of torch's own tensor each, all that says where its elements are and how they
  // are read; in place of the count of its holders stands where the storage has its memory. None if
  // one is no tensor or has no storage.
  nb::object Insides(const nb::list& tensors) const {
    const size_t n = offsets_.inside;
    std::vector<char> found(tensors.size() * n);
    const bool all = EachInside(tensors, [&found, n](size_t i, const char* inside) {
      std::memcpy(&found[i * n], inside, n);
      return true;
    });
    if (!all) return nb::none();
    return nb::bytes(found.data(), found.size());
  }

  // Whether these are the insides of as many tensors now.
  bool HaveInsides(const nb::list& tensors, const nb::bytes& known) const {
    const size_t n = offsets_.inside;
    if (known.size() != tensors.size() * n) return false;
    return EachInside(tensors, [&known, n](size_t i, const char* inside) {
      return std::memcmp(known.c_str() + i * n, inside, n) == 0;
    });
  }

 private:
  static nb::object ToWords(const std::vector<uint64_t>& words) {
    return nb::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint64_t));
  }

  // Calls `visit(number, bytes)` for each until one returns false. False then, or if one has no insides.
  template <typename Visit>
  bool EachInside(const nb::list& tensors, const Visit& visit) const {
    const auto prefetch = [this](const char* impl) {
      for (size_t line = 0; line < offsets_.inside; line += kLine) __builtin_prefetch(impl + line);
    };
    std::vector<const char*> impls;
    if (!Impls(tensors, prefetch, &impls)) return false;
    std::vector<const char*> storages = impls;
    if (!Follow(offsets_.storage, offsets_.address, &storages)) return false;
    char inside[kMostInside];
    for (size_t i = 0; i < impls.size(); ++i) {
      std::memcpy(inside, impls[i], offsets_.inside);
      std::memcpy(inside + offsets_.references, storages[i] + offsets_.address, sizeof(uint64_t));
      if (!visit(i, inside)) return false;
    }
    return true;
  }

  // Torch's own tensors of these objects; `prefetch` asks for what of each will be read. False if one has none.
  template <typename Prefetch>
  bool Impls(const nb::list& tensors, const Prefetch& prefetch, std::vector<const char*>* impls) const {
    auto* const kind = reinterpret_cast<PyTypeObject*>(kind_.ptr());
    const size_t n = tensors.size();
    const auto object = [&tensors](size_t i) { return PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)); };
    impls->resize(n);
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) __builtin_prefetch(object(i + kAhead));
      if (!PyObject_TypeCheck(object(i), kind)) return false;
      const char* const impl = Read<const char*>(reinterpret_cast<const char*>(object(i)) + offsets_.impl);
      if (impl == nullptr) return false;
      prefetch(impl);
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
             size_t address, size_t references, size_t inside) {
            new (self) TensorWords(kind, {impl, counter, version, storage, address, references, inside});
          },
          nb::arg("kind"), nb::kw_only(), nb::arg("impl"), nb::arg("counter"), nb::arg("version"),
          nb::arg("storage"), nb::arg("address"), nb::arg("references"), nb::arg("inside"))
      .def("versions", &TensorWords::Versions, nb::arg("tensors"))
      .def("insides", &TensorWords::Insides, nb::arg("tensors"))
      .def("have_insides", &TensorWords::HaveInsides, nb::arg("tensors"), nb::arg("known"));
}

}  // namespace layerwise
