// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "convert.h"
#include "layerwise/hash.h"
#include "layerwise/hash_job.h"
#include "layerwise/mapped.h"

namespace layerwise {

namespace {

// Less takes about a millisecond. Another thread that has got the GIL meanwhile may keep it
// for five.
constexpr uint64_t kHeldBytes = 8 << 20;

uint64_t HashBuffer(nb::handle data) {
  BufferView view(data);
  const Unheld unheld;
  return Xxh3(view.data(), view.size());
}

uint64_t HashMemory(uintptr_t address, size_t nbytes) {
  Check(CheckMapped(address, nbytes));
  const Unheld unheld;
  return Xxh3(reinterpret_cast<const void*>(address), nbytes);
}

struct PyHashing {
  nb::object keeping;  // outlives the job, which reads its memory
  std::unique_ptr<HashJob> it;
  uint64_t nbytes = 0;
};

void InitHashing(PyHashing* self, const std::vector<std::pair<uintptr_t, size_t>>& pieces, nb::object keeping) {
  std::vector<HashJob::Piece> taken;
  taken.reserve(pieces.size());
  uint64_t nbytes = 0;
  for (const auto& [address, n] : pieces) {
    Check(CheckMapped(address, n));
    taken.push_back({reinterpret_cast<const void*>(address), n});
    nbytes += n;
  }
  new (self) PyHashing{std::move(keeping), std::make_unique<HashJob>(std::move(taken)), nbytes};
}

std::vector<uint64_t> Hashes(PyHashing& hashing) {
  if (hashing.nbytes < kHeldBytes) return hashing.it->Hashes();
  const Unheld unheld;
  return hashing.it->Hashes();
}

}  // namespace

void BindHashes(nb::module_& m) {
  m.def("xxh3_64", HashBuffer, nb::arg("buffer"), "XXH3-64 (seed 0) of any contiguous buffer.");
  m.def("hash_memory", HashMemory, nb::arg("address"), nb::arg("nbytes"),
        "XXH3-64 of memory, which must stay mapped and unchanged until this returns. ValueError if it is not mapped.");
  m.def("hash_name", &HashName, "The instruction set that hashes: avx512, avx2, sse2 or scalar.");

  nb::class_<PyHashing>(m, "Hashing")
      .def("__init__", &InitHashing, nb::arg("pieces"), nb::arg("keeping") = nb::none())
      .def("hashes", &Hashes);
}

}  // namespace layerwise
