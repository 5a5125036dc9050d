// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "bind_buffers.h"
#include "convert.h"
#include "layerwise/shard_reader.h"
#include "layerwise/shard_writer.h"

namespace layerwise {

namespace {

using Path = std::filesystem::path;
using BlockTuple = std::tuple<int64_t, int64_t>;
using SegmentTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using ReadBlockTuple = std::tuple<int64_t, int64_t, std::optional<uint64_t>>;
using ReadSegmentTuple = std::tuple<int64_t, int64_t, uint64_t, int64_t>;

// What the Python objects hold: the core's classes are made by factories.
// A call to the operating system that does not return cannot be waited for, nor can what
// it uses be freed: when one of these goes with such a call, that stays.
constexpr double kDropS = 5;

struct PyPool {
  std::unique_ptr<WriterPool> it;
  bool closed = false;  // or tried to

  explicit PyPool(std::unique_ptr<WriterPool> pool) : it(std::move(pool)) {}
  PyPool(PyPool&&) = default;
  ~PyPool() {
    if (it == nullptr || closed) return;
    const Unheld unheld;
    it->Close(kDropS);
  }
};

struct PyPlan {
  std::shared_ptr<const Plan> it;
};

struct PyWriter {
  nb::object env, pool;  // which the writer uses to its end
  std::shared_ptr<ShardWriter> it;
  bool aborted = false;  // or tried to

  PyWriter(std::unique_ptr<ShardWriter> writer, nb::object env_, nb::object pool_)
      : env(std::move(env_)), pool(std::move(pool_)), it(std::move(writer)) {}
  PyWriter(PyWriter&&) = default;
  ~PyWriter() {
    if (it == nullptr) return;
    bool over;
    {
      const Unheld unheld;
      over = it->Abort(aborted ? 0 : kDropS);
    }
    if (over) return;
    new std::shared_ptr<ShardWriter>(std::move(it));
    env.release();
    pool.release();
  }
};

struct PyReader {
  std::shared_ptr<ShardReader> it;  // nullptr: closed

  // Of this thread's own: another one may close it meanwhile.
  std::shared_ptr<ShardReader> Here() const {
    if (it == nullptr) throw StatusError(Status::InvalidArgument("use of a closed shard"));
    return it;
  }
};

uint64_t Count(int64_t value) {
  if (value < 0) throw StatusError(Status::InvalidArgument(std::to_string(value) + " is negative"));
  return static_cast<uint64_t>(value);
}

WriterPool::Backend BackendOf(const std::string& name) {
  if (name == "posix") return WriterPool::Backend::kPosix;
  if (name == "uring") return WriterPool::Backend::kUring;
  throw StatusError(Status::InvalidArgument("backend '" + name + "' is not one of: posix, uring"));
}

WriterPool::Reads ReadsOf(const std::string& name) {
  if (name == "direct") return WriterPool::Reads::kDirect;
  if (name == "auto") return WriterPool::Reads::kAuto;
  if (name == "off") return WriterPool::Reads::kPlain;
  throw StatusError(Status::InvalidArgument("reads '" + name + "' is not one of: direct, auto, off"));
}

void InitPool(PyPool* self, int depth, const std::string& backend, PyBuffers* buffers, int64_t block_bytes,
              double patience_s, const std::string& reads) {
  WriterPool::Options options;
  options.backend = BackendOf(backend);
  options.depth = depth;
  if (buffers != nullptr) options.buffers = buffers->it;
  options.block_bytes = Count(block_bytes);
  options.patience_s = patience_s;
  options.reads = ReadsOf(reads);
  std::unique_ptr<WriterPool> pool;
  Check(WriterPool::Create(options, &pool));
  new (self) PyPool(std::move(pool));
}

nb::object ErrorOrNone(const Status& status) { return status.ok() ? nb::none() : MakeException(status); }

nb::object ProbeUring() {
  return ErrorOrNone(WriterPool::ProbeUring());
}

void InitPlan(PyPlan* self, const std::vector<BlockTuple>& blocks, const std::vector<SegmentTuple>& segments,
              int64_t tensors, int64_t tail_offset) {
  std::vector<Plan::Block> planned;
  planned.reserve(blocks.size());
  for (const auto& [offset, length] : blocks) planned.push_back({Count(offset), Count(length)});
  std::vector<Plan::Segment> cut;
  cut.reserve(segments.size());
  for (const auto& [block, block_offset, tensor, tensor_offset, length] : segments) {
    cut.push_back({Count(block), Count(block_offset), Count(tensor), Count(tensor_offset), Count(length)});
  }
  std::unique_ptr<Plan> plan;
  Check(Plan::Create(std::move(planned), std::move(cut), Count(tensors), Count(tail_offset), &plan));
  new (self) PyPlan{std::move(plan)};
}

void InitWriter(PyWriter* self, nb::object env, nb::object pool, PyPlan& plan, const Path& path, uint32_t mode,
                bool direct, bool hash) {
  Env& its_env = nb::cast<Env&>(env);
  WriterPool& its_pool = *nb::cast<PyPool&>(pool).it;
  std::unique_ptr<ShardWriter> writer;
  Unlocked([&] { return ShardWriter::Create(&its_env, &its_pool, plan.it, path.native(), mode, direct, &writer); });
  if (!hash) writer->SkipHashes();
  new (self) PyWriter(std::move(writer), std::move(env), std::move(pool));
}

PyWriter Order(nb::object env, nb::object pool, PyPlan& plan, const Path& folder, const Path& path,
               uint32_t folder_mode, uint32_t mode, bool direct, bool hash, const std::optional<Path>& reuse,
               PyWriter* before) {
  ShardWriter::Target target{folder.native(), folder_mode, path.native(), mode, direct, "", nullptr};
  if (reuse) target.spare = reuse->native();
  if (before != nullptr) target.before = before->it;
  std::unique_ptr<ShardWriter> writer;
  Check(ShardWriter::Order(&nb::cast<Env&>(env), nb::cast<PyPool&>(pool).it.get(), plan.it, std::move(target),
                           &writer));
  if (!hash) writer->SkipHashes();
  return PyWriter(std::move(writer), std::move(env), std::move(pool));
}

void InitReader(PyReader* self, Env& env, PyPool& pool, const Path& path, bool direct) {
  std::unique_ptr<ShardReader> reader;
  Unlocked([&] { return ShardReader::Open(&env, pool.it.get(), path.native(), direct, &reader); });
  new (self) PyReader{std::move(reader)};
}

bool Wait(PyWriter& writer, double timeout_s) {
  return InSlices(timeout_s, [&](double slice) { return writer.it->Wait(slice); });
}

bool WaitLeases(PyWriter& writer, double timeout_s) {
  return InSlices(timeout_s, [&](double slice) { return writer.it->WaitLeases(slice); });
}

bool Evacuate(PyWriter& writer, int64_t first, int64_t count, double timeout_s) {
  const size_t begin = Count(first);
  const size_t blocks = Count(count);
  Status status;
  bool safe = false;
  InSlices(timeout_s, [&](double slice) {
    status = writer.it->Evacuate(begin, blocks, slice, &safe);
    return safe || !status.ok();
  });
  Check(status);
  return safe;
}

nb::bytes ReadRange(PyReader& reader, int64_t offset, int64_t n) {
  std::string data;
  const uint64_t begin = Count(offset);
  const uint64_t length = Count(n);
  const std::shared_ptr<ShardReader> it = reader.Here();
  Unlocked([&] { return it->Read(begin, length, &data); });
  return ToBytes(data);
}

std::vector<size_t> ReadBlocks(PyReader& reader, const std::vector<ReadBlockTuple>& blocks,
                               const std::vector<ReadSegmentTuple>& segments) {
  std::vector<ShardReader::Block> wanted;
  wanted.reserve(blocks.size());
  for (const auto& [offset, length, hash] : blocks) {
    wanted.push_back({Count(offset), Count(length), hash.value_or(0), hash.has_value()});
  }
  std::vector<ShardReader::Segment> copies;
  copies.reserve(segments.size());
  for (const auto& [block, block_offset, address, length] : segments) {
    copies.push_back({Count(block), Count(block_offset), static_cast<uintptr_t>(address), Count(length)});
  }
  std::vector<size_t> bad;
  const std::shared_ptr<ShardReader> it = reader.Here();
  Unlocked([&] { return it->ReadBlocks(wanted, copies, &bad); });
  return bad;
}

nb::str HashesHex(PyWriter& writer) {
  std::vector<uint64_t> hashes;
  Check(writer.it->Hashes(&hashes));
  std::string text;
  text.reserve(16 * hashes.size());
  for (uint64_t hash : hashes) {
    char digits[17];
    std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(hash));
    text.append(digits, 16);
  }
  return nb::str(text.data(), text.size());
}

template <uint64_t ShardWriter::Counts::* kField>
uint64_t CountOf(PyWriter& writer) {
  return writer.it->counts().*kField;
}

void BindWriter(nb::module_& m) {
  nb::class_<PyWriter>(m, "ShardWriter")
      .def("__init__", &InitWriter, nb::arg("env"), nb::arg("pool"), nb::arg("plan"), nb::arg("path"),
           nb::arg("mode") = 0600, nb::arg("direct") = true, nb::arg("hash") = true)
      .def_static("order", &Order, nb::arg("env"), nb::arg("pool"), nb::arg("plan"), nb::arg("folder"),
                  nb::arg("path"), nb::arg("folder_mode"), nb::arg("mode"), nb::arg("direct"), nb::arg("hash"),
                  nb::arg("reuse").none() = nb::none(), nb::arg("before").none() = nb::none())
      .def("set_address",
           [](PyWriter& writer, size_t tensor, uintptr_t address) { Check(writer.it->SetAddress(tensor, address)); },
           nb::arg("tensor"), nb::arg("address"))
      .def("set_addresses",
           [](PyWriter& writer, const std::vector<uintptr_t>& addresses) {
             Check(writer.it->SetAddresses(addresses));
           }, nb::arg("addresses"))
      .def("submit",
           [](PyWriter& writer, int64_t first, int64_t count) {
             const size_t begin = Count(first);
             const size_t blocks = Count(count);
             Unlocked([&] { return writer.it->Submit(begin, blocks); });
           }, nb::arg("first_block"), nb::arg("count"))
      .def("submit_buffer",
           [](PyWriter& writer, int64_t first, int64_t count, PyBuffer& buffer) {
             const size_t begin = Count(first);
             const size_t blocks = Count(count);
             if (buffer.views > 0) throw nb::buffer_error("submission of a buffer that a view of it still uses");
             if (!buffer.it) throw StatusError(Status::FailedPrecondition("submission of a released buffer"));
             BufferPool::Buffer memory = std::move(buffer.it);
             Unlocked([&] { return writer.it->Submit(begin, blocks, std::move(memory)); });
           }, nb::arg("first_block"), nb::arg("count"), nb::arg("buffer"))
      .def("append",
           [](PyWriter& writer, nb::handle data) {
             BufferView view(data);
             size_t blocks = 0;
             Unlocked([&] { return writer.it->Append(view.view(), &blocks); });
             return blocks;
           }, nb::arg("data"))
      .def("wait", &Wait, nb::arg("timeout_s"))
      .def("wait_leases", &WaitLeases, nb::arg("timeout_s"))
      .def("evacuate", &Evacuate, nb::arg("first_block"), nb::arg("count"), nb::arg("timeout_s"))
      .def_prop_ro("submitted", &CountOf<&ShardWriter::Counts::submitted>)
      .def_prop_ro("completed", &CountOf<&ShardWriter::Counts::completed>)
      .def_prop_ro("pending", &CountOf<&ShardWriter::Counts::pending>)
      .def_prop_ro("leased", &CountOf<&ShardWriter::Counts::leased>)
      .def_prop_ro("bytes_written", &CountOf<&ShardWriter::Counts::bytes_written>)
      .def_prop_ro("bytes_copied", &CountOf<&ShardWriter::Counts::bytes_copied>)
      .def_prop_ro("bytes_evacuated", &CountOf<&ShardWriter::Counts::bytes_evacuated>)
      .def_prop_ro("direct", [](PyWriter& writer) { return writer.it->direct(); })
      .def_prop_ro("memory_align", [](PyWriter& writer) { return writer.it->alignment().memory; })
      .def("block_times",
           [](PyWriter& writer) {
             std::vector<std::pair<int64_t, int64_t>> times;
             for (const auto& [started, ended] : writer.it->times()) times.emplace_back(started, ended);
             return times;
           })
      .def("error", [](PyWriter& writer) { return ErrorOrNone(writer.it->error()); })
      .def("reuse_refused", [](PyWriter& writer) { return ErrorOrNone(writer.it->reuse_refused()); })
      .def("hashes_hex", &HashesHex)
      .def("block_hash", [](PyWriter& writer, size_t index) { return writer.it->BlockHash(index); },
           nb::arg("index"))
      .def("finish",
           [](PyWriter& writer, nb::handle header) {
             BufferView view(header);
             Unlocked([&] { return writer.it->Finish(view.view()); });
           }, nb::arg("header"))
      .def("abort",
           [](PyWriter& writer, double timeout_s) {
             writer.aborted = true;
             return InSlices(timeout_s, [&](double slice) { return writer.it->Abort(slice); });
           }, nb::arg("timeout_s") = kNoTimeout);
}

}  // namespace

void BindShard(nb::module_& m) {
  nb::class_<PyPool>(m, "WriterPool")
      .def("__init__", &InitPool, nb::arg("depth"), nb::arg("backend") = "posix",
           nb::arg("buffers").none() = nb::none(), nb::arg("block_bytes") = 1 << 20,
           nb::arg("patience_s") = kNoTimeout, nb::arg("reads") = "direct")
      .def_static("probe_uring", &ProbeUring)
      .def_prop_ro("backend",
                   [](PyPool& pool) {
                     return pool.it->backend() == WriterPool::Backend::kUring ? "uring" : "posix";
                   })
      .def_prop_ro("depth", [](PyPool& pool) { return pool.it->depth(); })
      .def_prop_ro("bytes_read", [](PyPool& pool) { return pool.it->read_counts().read; })
      .def_prop_ro("bytes_cached", [](PyPool& pool) { return pool.it->read_counts().cached; })
      .def("close",
           [](PyPool& pool, double timeout_s) {
             pool.closed = true;
             const Unheld unheld;
             return pool.it->Close(timeout_s);
           }, nb::arg("timeout_s") = kNoTimeout);

  nb::class_<PyPlan>(m, "Plan")
      .def("__init__", &InitPlan, nb::arg("blocks"), nb::arg("segments"), nb::arg("tensors"),
           nb::arg("tail_offset") = 0)
      .def_prop_ro("blocks", [](PyPlan& plan) { return plan.it->blocks().size(); })
      .def_prop_ro("tensors", [](PyPlan& plan) { return plan.it->tensors(); })
      .def_prop_ro("end", [](PyPlan& plan) { return plan.it->end(); })
      .def_prop_ro("block_bytes", [](PyPlan& plan) { return plan.it->block_bytes(); });

  BindWriter(m);

  nb::class_<PyReader>(m, "ShardReader")
      .def("__init__", &InitReader, nb::arg("env"), nb::arg("pool"), nb::arg("path"), nb::arg("direct") = true,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def_prop_ro("size", [](PyReader& reader) { return reader.Here()->size(); })
      .def_prop_ro("cached", [](PyReader& reader) { return reader.Here()->cached(); })
      .def("close",
           [](PyReader& reader) {
             std::shared_ptr<ShardReader> last = std::move(reader.it);
             const Unheld unheld;
             last.reset();
           })
      .def("read", &ReadRange, nb::arg("offset"), nb::arg("n"))
      .def("read_blocks", &ReadBlocks, nb::arg("blocks"), nb::arg("segments"));
}

}  // namespace layerwise
