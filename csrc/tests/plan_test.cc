// SPDX-License-Identifier: Apache-2.0
#include "layerwise/plan.h"

#include "scratch.h"

namespace layerwise {

namespace {

using Blocks = std::vector<Plan::Block>;
using Segments = std::vector<Plan::Segment>;

std::string Refusal(Blocks blocks, Segments segments = {}, uint64_t tensors = 1, uint64_t tail = 0) {
  std::unique_ptr<Plan> plan;
  const Status status = Plan::Create(std::move(blocks), std::move(segments), tensors, tail, &plan);
  CHECK(status.ok() == (plan != nullptr));
  if (!status.ok()) CHECK(status.code() == Status::Code::kInvalidArgument);
  return status.ok() ? "" : status.message();
}

bool Says(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("a plan keeps its blocks and finds the segments of each") {
  std::unique_ptr<Plan> plan;
  REQUIRE_OK(Plan::Create({{4096, 8192}, {16384, 4096}, {20480, 4096}},
                          {{0, 0, 0, 0, 100}, {0, 100, 1, 0, 8092}, {2, 5, 0, 100, 10}}, 2, 0, &plan));
  CHECK(plan->segments(0).size() == 2);
  CHECK(plan->segments(1).empty());
  REQUIRE(plan->segments(2).size() == 1);
  CHECK(plan->segments(2)[0].tensor_offset == 100);
  CHECK(plan->end() == 24576);
  CHECK(plan->block_bytes() == 8192);
}

TEST_CASE("a plan without blocks ends at its tail offset") {
  std::unique_ptr<Plan> plan;
  REQUIRE_OK(Plan::Create({}, {}, 0, 8192, &plan));
  CHECK(plan->end() == 8192);
  CHECK(plan->block_bytes() == 1 << 20);
}

TEST_CASE("a plan refuses bad blocks and names the first") {
  CHECK(Refusal({{4096, 4096}}).empty());
  CHECK(Says(Refusal({{4096, 4096}, {8193, 4096}}), "block 1"));
  CHECK(Says(Refusal({{4096, 100}}), "multiple of 4096"));
  CHECK(Says(Refusal({{4096, 0}}), "empty"));
  CHECK(Says(Refusal({{4096, 8192}, {8192, 4096}}), "begins before"));
  CHECK(Says(Refusal({{8192, 4096}, {4096, 4096}}), "begins before"));
  CHECK(Says(Refusal({{0x7FFFFFFFFFFFF000u, 4096}}), "largest file offset"));
  CHECK(Says(Refusal({{0xFFFFFFFFFFFFF000u, 8192}}), "largest file offset"));
  CHECK(Says(Refusal({{4096, 4096}}, {}, 1, 100), "tail offset"));
}

TEST_CASE("a plan refuses bad segments and names the first") {
  const Blocks blocks = {{4096, 4096}, {8192, 4096}};
  CHECK(Refusal(blocks, {{0, 0, 0, 0, 4096}, {1, 4095, 0, 4096, 1}}).empty());
  CHECK(Says(Refusal(blocks, {{2, 0, 0, 0, 1}}), "block that the plan lacks"));
  CHECK(Says(Refusal(blocks, {{0, 0, 1, 0, 1}}), "tensor that the plan lacks"));
  CHECK(Says(Refusal(blocks, {{0, 0, 0, 0, 0}}), "empty"));
  CHECK(Says(Refusal(blocks, {{0, 1, 0, 0, 4096}}), "leaves its block"));
  CHECK(Says(Refusal(blocks, {{0, 1, 0, 0, UINT64_MAX}}), "largest offset"));
  CHECK(Says(Refusal(blocks, {{0, UINT64_MAX, 0, 0, 1}}), "leaves its block"));
  CHECK(Says(Refusal(blocks, {{0, 0, 0, UINT64_MAX, 1}}), "largest offset"));
  CHECK(Says(Refusal(blocks, {{0, 0, 0, 0, 10}, {0, 9, 0, 0, 10}}), "segment 1"));
  CHECK(Says(Refusal(blocks, {{1, 0, 0, 0, 10}, {0, 0, 0, 0, 10}}), "later block"));
}

}  // namespace layerwise
