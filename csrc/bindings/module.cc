// SPDX-License-Identifier: Apache-2.0
#include "convert.h"
#include "layerwise/calls.h"
#include "layerwise/huge_pages.h"
#include "layerwise/signal_ear.h"
#include "layerwise/writer_pool.h"

namespace layerwise {

namespace {

constexpr double kExitS = 5;

void CloseAllPools() {
  const Unheld unheld;
  WriterPool::CloseAll(kExitS);
}

// (operation, path, seconds) of each.
nb::list Calls() {
  nb::list out;
  for (const Call& call : CallsUnderWay()) {
    out.append(nb::make_tuple(call.operation, DecodePath(call.path), call.Seconds()));
  }
  return out;
}

size_t MakeHugeMemory(uintptr_t address, size_t nbytes) {
  const Unheld unheld;
  size_t huge = 0;
  Check(MakeHuge(address, nbytes, &huge));
  return huge;
}

}  // namespace

NB_MODULE(_native, m) {
  // Engines are often globals, and the interpreter does not free those.
  nb::set_leak_warnings(false);
  nb::register_exception_translator(TranslateStatus);

  m.doc() = "The native core: files, shards, hashes. Errors of the operating system are OSError.";
  m.def("make_huge", MakeHugeMemory, nb::arg("address"), nb::arg("nbytes"),
        "Asks for huge pages under memory, which keeps its content; returns the bytes that have them now.");
  m.def("hear_signal", [](int number, int bell) { Check(HearSignal(number, bell)); },
        nb::arg("number"), nb::arg("bell"),
        "From now on each signal adds 1 to the eventfd, in front of whoever else handles it; again: in front again.");
  m.def("stop_hearing", &StopHearing, nb::arg("bell"), "The signal is handled as before.");
  m.def("forget_dead_children", &ForgetDeadChildren, "SIGCHLD is handled as by default: not at all.");
  m.def("outlive_signal", [](int number) { Check(OutliveSignal(number)); }, nb::arg("number"),
        "In a child: the signal ends it only if its parent sent it or is dead.");
  m.def("calls_under_way", &Calls,
        "(operation, path, seconds) of each call to the operating system that has not returned; the longest first.");
  m.def("keep_forever", [](nb::object object) { object.release(); }, nb::arg("object"),
        "What this refers to is never freed, not at the interpreter's exit either.");
  BindEnv(m);
  BindBuffers(m);
  BindHashes(m);
  BindObjects(m);
  BindShard(m);
  BindTensors(m);

  // Leased memory is freed after this.
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&CloseAllPools));
}

}  // namespace layerwise
