// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <set>

#include "memory_env.h"
#include "scratch.h"

// The durability model: one test a rule, one a policy.

namespace layerwise {

namespace {

std::unique_ptr<MemoryEnv> CrashNow(const MemoryEnv& env, CrashPolicy policy, uint64_t seed = 0) {
  return env.Crash(env.LogSize(), seed, policy);
}

// "-" if the file is not there.
std::string Content(MemoryEnv* env, const std::string& path) {
  std::string data;
  return env->ReadFile(path, 1 << 30, &data).ok() ? data : "-";
}

Status PutUnsynced(MemoryEnv* env, const std::string& path, const std::string& data) {
  std::unique_ptr<WritableFile> file;
  Status status = env->NewWritableFile(path, 0600, false, &file);
  return status.ok() ? file->Pwrite(data.data(), data.size(), 0) : status;
}

}  // namespace

TEST_CASE("a synced file without a synced directory has no name") {
  MemoryEnv env;
  REQUIRE_OK(env.WriteFile("/f", "data", 0600));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/f") == "-");
  CHECK(Content(CrashNow(env, CrashPolicy::kData).get(), "/f") == "-");
  CHECK(Content(CrashNow(env, CrashPolicy::kNames).get(), "/f") == "data");
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/f") == "data");
}

TEST_CASE("a synced directory without a synced file has a name and no data") {
  MemoryEnv env;
  REQUIRE_OK(PutUnsynced(&env, "/f", "data"));
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/f") == "");
  CHECK(Content(CrashNow(env, CrashPolicy::kNames).get(), "/f") == "");
  CHECK(Content(CrashNow(env, CrashPolicy::kData).get(), "/f") == "data");
  CHECK(Content(CrashNow(env, CrashPolicy::kAll).get(), "/f") == "data");
}

TEST_CASE("a rename is durable only by a sync of its directory, and then replaces") {
  MemoryEnv env;
  REQUIRE_OK(env.WriteFile("/old", "old", 0600));
  REQUIRE_OK(env.WriteFile("/new", "new", 0600));
  REQUIRE_OK(env.SyncDir("/"));
  REQUIRE_OK(env.Rename("/new", "/old"));
  CHECK(Content(&env, "/old") == "new");
  auto lost = CrashNow(env, CrashPolicy::kNone);
  CHECK(Content(lost.get(), "/old") == "old");
  CHECK(Content(lost.get(), "/new") == "new");
  auto kept = CrashNow(env, CrashPolicy::kNames);
  CHECK(Content(kept.get(), "/old") == "new");
  CHECK(Content(kept.get(), "/new") == "-");
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/old") == "new");
}

TEST_CASE("a rename between directories needs both of them synced") {
  MemoryEnv env;
  REQUIRE_OK(env.MakeDir("/a", 0700));
  REQUIRE_OK(env.MakeDir("/b", 0700));
  REQUIRE_OK(env.SyncDir("/"));
  REQUIRE_OK(env.WriteFile("/a/f", "x", 0600));
  REQUIRE_OK(env.SyncDir("/a"));
  REQUIRE_OK(env.Rename("/a/f", "/b/f"));
  REQUIRE_OK(env.SyncDir("/b"));
  auto half = CrashNow(env, CrashPolicy::kNone);
  CHECK(Content(half.get(), "/a/f") == "x");
  CHECK(Content(half.get(), "/b/f") == "-");
  REQUIRE_OK(env.SyncDir("/a"));
  auto whole = CrashNow(env, CrashPolicy::kNone);
  CHECK(Content(whole.get(), "/a/f") == "-");
  CHECK(Content(whole.get(), "/b/f") == "x");
}

TEST_CASE("removals and new directories are durable only by a sync of the parent") {
  MemoryEnv env;
  REQUIRE_OK(env.MakeDir("/d", 0700));
  REQUIRE_OK(env.WriteFile("/d/f", "x", 0600));
  REQUIRE_OK(env.SyncDir("/d"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/d/f") == "-");
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/d/f") == "x");
  REQUIRE_OK(env.Unlink("/d/f"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/d/f") == "x");
  CHECK(Content(CrashNow(env, CrashPolicy::kAll).get(), "/d/f") == "-");
  REQUIRE_OK(env.SyncDir("/d"));
  REQUIRE_OK(env.RemoveDir("/d"));
  FileInfo info;
  CHECK(CrashNow(env, CrashPolicy::kNone)->Stat("/d", &info).ok());
  REQUIRE_OK(env.SyncDir("/"));
  CHECK_ERRNO(CrashNow(env, CrashPolicy::kNone)->Stat("/d", &info), ENOENT);
}

TEST_CASE("a prefix of the log is the past") {
  MemoryEnv env;
  REQUIRE_OK(env.WriteFile("/f", "one", 0600));
  REQUIRE_OK(env.SyncDir("/"));
  env.Mark("committed 1");
  REQUIRE_OK(env.Unlink("/f"));
  REQUIRE_OK(env.SyncDir("/"));
  REQUIRE(env.Marks().size() == 1);
  const auto [index, text] = env.Marks()[0];
  CHECK(text == "committed 1");
  CHECK(env.LogEntry(index - 1) == "sync_dir /");
  CHECK(Content(env.Crash(index, 0, CrashPolicy::kNone).get(), "/f") == "one");
  CHECK(Content(env.Crash(env.LogSize(), 0, CrashPolicy::kAll).get(), "/f") == "-");
}

TEST_CASE("a random crash mixes sectors, sizes and names independently") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile("/f", 0600, false, &file));
  const std::string old(1024, 'o');
  REQUIRE_OK(file->Pwrite(old.data(), old.size(), 0));
  REQUIRE_OK(file->Sync());
  REQUIRE_OK(env.SyncDir("/"));
  const std::string one(1536, '1'), two(512, '2');
  REQUIRE_OK(file->Pwrite(one.data(), one.size(), 0));
  REQUIRE_OK(file->Pwrite(two.data(), two.size(), 0));
  REQUIRE_OK(PutUnsynced(&env, "/g", ""));
  REQUIRE_OK(env.Rename("/g", "/h"));

  std::set<std::string> contents, names;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    auto after = CrashNow(env, CrashPolicy::kRandom, seed);
    const std::string content = Content(after.get(), "/f");
    const bool known_size = content.size() == 1024 || content.size() == 1536;
    CHECK(known_size);
    std::string sectors;
    for (size_t i = 0; i < content.size(); i += 512) {
      CHECK(content.substr(i, 512) == std::string(512, content[i]));
      sectors += content[i] == '\0' ? '0' : content[i];
    }
    contents.insert(sectors);
    std::vector<std::string> list;
    REQUIRE_OK(after->ListDir("/", &list));
    std::string all;
    for (const std::string& name : list) all += name;
    names.insert(all);
    CHECK(Content(CrashNow(env, CrashPolicy::kRandom, seed).get(), "/f") == content);
  }
  // Three versions of the first sector, two of the second, and none or two of the third.
  CHECK(contents.size() == 3 * 2 * 3);
  CHECK(contents.contains("o1"));
  CHECK(contents.contains("2o1"));
  CHECK(contents.contains("1o0"));
  // The rename alone gives /h, the create alone /g.
  CHECK(names == std::set<std::string>{"f", "fg", "fh"});
}

TEST_CASE("a sync covers what was written before it, and only that") {
  MemoryEnv env;
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.NewWritableFile("/f", 0600, false, &file));
  REQUIRE_OK(env.SyncDir("/"));
  REQUIRE_OK(file->Pwrite("abc", 3, 0));
  REQUIRE_OK(file->Sync());
  REQUIRE_OK(file->Pwrite("XYZ!", 4, 0));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/f") == "abc");
  CHECK(Content(CrashNow(env, CrashPolicy::kAll).get(), "/f") == "XYZ!");
}

TEST_CASE("what a crash left is durable, and crashes again from there") {
  MemoryEnv env;
  REQUIRE_OK(env.WriteFile("/f", "x", 0600));
  auto first = CrashNow(env, CrashPolicy::kAll);
  CHECK(first->LogSize() == 0);
  CHECK(Content(CrashNow(*first, CrashPolicy::kNone).get(), "/f") == "x");
  REQUIRE_OK(first->WriteFile("/g", "y", 0600));
  CHECK(Content(CrashNow(*first, CrashPolicy::kNone).get(), "/g") == "-");
  CHECK(Content(&env, "/g") == "-");
}

TEST_CASE("policies have names") {
  CrashPolicy policy = CrashPolicy::kNone;
  REQUIRE_OK(ParsePolicy("random", &policy));
  CHECK(policy == CrashPolicy::kRandom);
  CHECK(!ParsePolicy("some", &policy).ok());
}

TEST_CASE("a reused file keeps old sectors until they are overwritten and flushed, and may come back by its old name") {
  MemoryEnv env;
  REQUIRE_OK(env.WriteFile("/old", std::string(1536, 'o'), 0600));
  REQUIRE_OK(env.SyncDir("/"));
  std::unique_ptr<WritableFile> file;
  REQUIRE_OK(env.ReuseFile("/old", "/new", 0600, false, &file));
  const std::string data(1024, 'n');
  REQUIRE_OK(file->Pwrite(data.data(), data.size(), 0));
  REQUIRE_OK(file->Truncate(1024));

  std::set<std::string> states;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    auto after = CrashNow(env, CrashPolicy::kRandom, seed);
    std::string state;
    for (const char* path : {"/old", "/new"}) {
      const std::string content = Content(after.get(), path);
      if (content == "-") continue;
      state += path;
      for (size_t i = 0; i < content.size(); i += 512) state += content[i] == '\0' ? '0' : content[i];
    }
    states.insert(state);
  }
  CHECK(states.contains("/oldooo"));
  CHECK(states.contains("/oldnoo"));
  CHECK(states.contains("/newno"));
  CHECK(states.contains("/newnn"));
  CHECK(states.contains("/newono"));

  REQUIRE_OK(file->Sync());
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/old") == data);
  REQUIRE_OK(env.SyncDir("/"));
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/new") == data);
  CHECK(Content(CrashNow(env, CrashPolicy::kNone).get(), "/old") == "-");
}

}  // namespace layerwise
