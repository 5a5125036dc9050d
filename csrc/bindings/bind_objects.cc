// SPDX-License-Identifier: Apache-2.0
#include <utility>
#include <vector>

#include "convert.h"

namespace layerwise {

namespace {

// Compares entries, one after the other, with flat lists of names and objects. Runs no Python
// code, so that a dict can be walked meanwhile.
class Comparison {
 public:
  Comparison(const nb::list& names, const nb::list& values) : names_(names), values_(values) {}

  // Whether the next entry has the name that is known. Takes note if its object is another one.
  bool Take(PyObject* name, PyObject* value) {
    if (at_ >= names_.size() || !IsEqual(PyList_GET_ITEM(names_.ptr(), at_), name)) return false;
    if (PyList_GET_ITEM(values_.ptr(), at_) != value) others_.emplace_back(at_, nb::borrow(value));
    at_ += 1;
    return true;
  }

  size_t taken() const { return at_; }

  // (place, object) of each that was another one.
  nb::list others() const {
    nb::list found;
    for (const auto& [place, value] : others_) found.append(nb::make_tuple(place, value));
    return found;
  }

 private:
  // Strings by value; what else may be a name, by identity.
  static bool IsEqual(PyObject* one, PyObject* other) {
    if (one == other) return true;
    return PyUnicode_CheckExact(one) && PyUnicode_CheckExact(other) && PyUnicode_Compare(one, other) == 0;
  }

  const nb::list& names_;
  const nb::list& values_;
  std::vector<std::pair<size_t, nb::object>> others_;
  size_t at_ = 0;
};

// After a training step nothing of these dicts is in the cache: each is asked for this many dicts
// ahead of its turn, and what it leads to half as many.
constexpr size_t kAhead = 16;

void PrefetchDict(PyObject* mapping) { __builtin_prefetch(&reinterpret_cast<PyDictObject*>(mapping)->ma_keys); }

void PrefetchEntries(PyObject* mapping) {
  if (!PyDict_Check(mapping)) return;
  const auto* const keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(mapping)->ma_keys);
  for (size_t line = 0; line < 3; ++line) __builtin_prefetch(keys + line * 64);
}

bool Walk(nb::handle mapping, nb::handle default_dict, Comparison* comparison) {
  // Of these two nothing overrides in which order the entries come.
  if (PyDict_CheckExact(mapping.ptr()) || mapping.type().is(default_dict)) {
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(mapping.ptr(), &at, &name, &value);) {
      if (!comparison->Take(name, value)) return false;
    }
    return true;
  }
  for (nb::handle item : nb::list(mapping.attr("items")())) {
    const nb::tuple entry(item);
    if (!comparison->Take(nb::object(entry[0]).ptr(), nb::object(entry[1]).ptr())) return false;
  }
  return true;
}

nb::object OtherObjects(const nb::list& mappings, const nb::list& sizes, const nb::list& names, const nb::list& values) {
  if (names.size() != values.size()) {
    throw StatusError(Status::InvalidArgument("a name for each value is expected"));
  }
  if (mappings.size() != sizes.size()) return nb::none();
  const nb::object default_dict = nb::module_::import_("collections").attr("defaultdict");
  Comparison comparison(names, values);
  size_t end = 0;
  const auto mapping = [&mappings](size_t i) { return PyList_GET_ITEM(mappings.ptr(), static_cast<Py_ssize_t>(i)); };
  for (size_t i = 0; i < mappings.size(); ++i) {
    if (i + kAhead < mappings.size()) PrefetchDict(mapping(i + kAhead));
    if (i + kAhead / 2 < mappings.size()) PrefetchEntries(mapping(i + kAhead / 2));
    end += nb::cast<size_t>(sizes[i]);
    if (!Walk(mappings[i], default_dict, &comparison) || comparison.taken() != end) return nb::none();
  }
  if (end != names.size()) return nb::none();
  return comparison.others();
}

}  // namespace

void BindObjects(nb::module_& m) {
  m.def("other_objects", &OtherObjects, nb::arg("mappings"), nb::arg("sizes"), nb::arg("names"), nb::arg("values"),
        "(place in `values`, object) of each that is another one now; None if the mappings have other names.");
}

}  // namespace layerwise
