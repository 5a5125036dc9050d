// SPDX-License-Identifier: Apache-2.0
#include "layerwise/memory_hold.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "answers.h"

namespace layerwise {

namespace {

std::atomic<int> freed{0};

void Count(void* context) {
  *static_cast<int*>(context) = -1;
  freed += 1;
}

void CountOtherwise(void*) { freed += 1000; }

// As torch's DataPtr: calls the deleter when it lets go.
struct Storage {
  int content = 7;
  MemoryHold::Owner owner{reinterpret_cast<uintptr_t>(&content), &Count, &content};

  MemoryHold::Claim claim() { return {&owner, owner.data}; }
  void Free() { owner.deleter(owner.context); }
};

std::unique_ptr<MemoryHold> Hold(const std::vector<MemoryHold::Claim>& claims) {
  std::unique_ptr<MemoryHold> hold;
  REQUIRE(MemoryHold::Take(claims, &hold).ok());
  return hold;
}

}  // namespace

TEST_CASE("held memory is freed when its owner and the last hold have let go of it, once") {
  for (const bool owner_first : {true, false}) {
    freed = 0;
    Storage storage;
    auto one = Hold({storage.claim()});
    CHECK((storage.owner.deleter == MemoryHold::deleter()));
    auto other = Hold({storage.claim(), storage.claim()});
    if (owner_first) {
      storage.Free();
      CHECK(MemoryHold::orphans() == 1);
      other.reset();
      CHECK(freed == 0);
      CHECK(storage.content == 7);
      one.reset();
    } else {
      one.reset();
      other.reset();
      CHECK(freed == 0);
      storage.Free();
    }
    CHECK(freed == 1);
    CHECK(MemoryHold::orphans() == 0);
  }
}

TEST_CASE("memory that comes again at the same place is another's") {
  freed = 0;
  Storage storage;
  Hold({storage.claim()}).reset();
  storage.Free();
  CHECK(freed == 1);
  storage.owner.deleter = &CountOtherwise;
  auto hold = Hold({storage.claim()});
  storage.Free();
  hold.reset();
  CHECK(freed == 1001);
}

TEST_CASE("several owners of one context are each freed once") {
  freed = 0;
  Storage storage;
  MemoryHold::Owner twin = storage.owner;
  auto hold = Hold({storage.claim(), {&twin, twin.data}});
  storage.Free();
  CHECK(freed == 0);
  hold.reset();
  CHECK(freed == 1);
  twin.deleter(twin.context);
  CHECK(freed == 2);
  CHECK(MemoryHold::orphans() == 0);
}

TEST_CASE("what moved, is freed by nobody or in two ways is refused, and nothing stays held") {
  freed = 0;
  Storage good;
  Storage bad;
  MemoryHold::Claim claim = bad.claim();
  MemoryHold::Owner twin = good.owner;
  SUBCASE("moved") { claim.data += 1; }
  SUBCASE("without a context") { bad.owner.context = nullptr; }
  SUBCASE("without a deleter") { bad.owner.deleter = nullptr; }
  SUBCASE("two ways") {
    twin.deleter = &CountOtherwise;
    claim = {&twin, twin.data};
  }
  std::unique_ptr<MemoryHold> hold;
  const Status status = MemoryHold::Take({good.claim(), claim}, &hold);
  CHECK(status.code() == Status::Code::kFailedPrecondition);
  CHECK(hold == nullptr);
  good.Free();
  CHECK(freed == 1);
}

TEST_CASE("owners and holds let go on many threads at once, and each memory is freed once") {
  freed = 0;
  constexpr int kStorages = 200;
  std::vector<Storage> storages(kStorages);
  std::vector<MemoryHold::Claim> claims;
  for (Storage& storage : storages) {
    storage.owner.data = reinterpret_cast<uintptr_t>(&storage.content);
    storage.owner.context = &storage.content;
    claims.push_back(storage.claim());
  }
  std::vector<std::unique_ptr<MemoryHold>> holds;
  for (int i = 0; i < 4; ++i) holds.push_back(Hold(claims));
  std::vector<std::thread> threads;
  for (auto& hold : holds) threads.emplace_back([&hold] { hold.reset(); });
  threads.emplace_back([&] {
    for (Storage& storage : storages) storage.Free();
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(freed == kStorages);
  CHECK(MemoryHold::orphans() == 0);
}

TEST_CASE("a forked child frees what it has, though others hold and free at that moment") {
  Storage storage;
  auto hold = Hold({storage.claim()});
  std::atomic<bool> over{false};
  std::thread busy([&] {
    Storage mine;
    while (!over) Hold({mine.claim()}).reset();
    mine.Free();
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      freed = 0;
      hold.reset();
      storage.Free();
      Leave(freed == 1 ? 0 : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  over = true;
  busy.join();
  CHECK(storage.content == 7);
  hold.reset();
  storage.Free();
}

}  // namespace layerwise
