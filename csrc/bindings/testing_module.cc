// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "convert.h"
#include "fault_env.h"
#include "memory_env.h"

namespace layerwise {

namespace {

std::string LogEntry(const MemoryEnv& env, size_t i) {
  if (i >= env.LogSize()) throw nb::index_error("log entry");
  return env.LogEntry(i);
}

std::unique_ptr<MemoryEnv> Crash(const MemoryEnv& env, size_t prefix, uint64_t seed, const std::string& policy) {
  CrashPolicy parsed = CrashPolicy::kNone;
  Check(ParsePolicy(policy, &parsed));
  if (prefix > env.LogSize()) {
    Check(Status::InvalidArgument("prefix " + std::to_string(prefix) + " of a log with " +
                                  std::to_string(env.LogSize()) + " entries"));
  }
  const Unheld unheld;
  return env.Crash(prefix, seed, parsed);
}

void Fail(FaultEnv& env, std::optional<uint64_t> index, std::optional<std::string> operation,
          const std::string& path_pattern, int error_number, int times, bool short_write) {
  FaultPlan::Rule rule;
  rule.index = index;
  rule.operation = std::move(operation);
  rule.path_pattern = path_pattern;
  rule.error_number = error_number;
  rule.times = times;
  rule.short_write = short_write;
  Check(env.Fail(std::move(rule)));
}

}  // namespace

NB_MODULE(layerwise_native_testing, m) {
  nb::module_::import_("layerwise_dist._native");  // has Env and the files, which these are kinds of
  nb::register_exception_translator(TranslateStatus);

  m.doc() = "File systems for tests of layerwise_dist: one that forgets, one that fails.";
  nb::class_<MemoryEnv, Env>(m, "MemoryEnv")
      .def(nb::init<>())
      .def_prop_ro("log_size", &MemoryEnv::LogSize)
      .def("log_entry", &LogEntry, nb::arg("i"))
      .def("mark", &MemoryEnv::Mark, nb::arg("text"))
      .def("marks", &MemoryEnv::Marks)
      .def("crash", &Crash, nb::arg("prefix"), nb::arg("seed") = 0, nb::arg("policy") = "random")
      .def("fingerprint", &MemoryEnv::Fingerprint)
      .def("drop",
           [](MemoryEnv& env, const std::string& operation, const std::string& path_pattern) {
             Check(env.Drop(operation, path_pattern));
           }, nb::arg("operation"), nb::arg("path_pattern") = "*")
      .def_prop_ro("dropped", &MemoryEnv::dropped);

  nb::class_<FaultEnv, Env>(m, "FaultEnv")
      .def(nb::init<Env*>(), nb::arg("base"), nb::keep_alive<1, 2>())
      .def("fail", &Fail, nb::arg("index").none() = nb::none(), nb::arg("operation").none() = nb::none(),
           nb::arg("path_pattern") = "*", nb::arg("errno") = EIO, nb::arg("times") = 1, nb::arg("short") = false)
      .def("delay",
           [](FaultEnv& env, const std::string& operation, const std::string& path_pattern, double seconds) {
             Check(env.Delay(operation, path_pattern, seconds));
           }, nb::arg("operation"), nb::arg("path_pattern"), nb::arg("seconds"))
      .def("clear", &FaultEnv::Clear)
      .def_prop_ro("operations", &FaultEnv::operations)
      .def_prop_ro("injected", &FaultEnv::injected)
      .def("trace", &FaultEnv::trace);
}

}  // namespace layerwise
