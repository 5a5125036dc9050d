#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/fuzz/native.sh [SECONDS] [SEED]: fuzzes the shard reader under ASan and UBSan, 10 seconds without an argument.
# With clang++ it is libFuzzer; without, GCC and a driver of its own, guided by coverage too. Needs what launch/setup.sh
# installs. The corpus is tests/fuzz/corpus/shard_reader, to which it adds a copy below build/fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:-10}
seed=${2:-1}
build=build/fuzz
mkdir -p "$build/corpus"
cp -n tests/fuzz/corpus/shard_reader/* "$build/corpus/" 2>/dev/null || true
core=()
vectors=()
for source in csrc/src/*.cc csrc/testing/*.cc; do
  case $source in
    */hash_avx*.cc) [ "$(uname -m)" != x86_64 ] || vectors+=("$source") ;;
    *) core+=("$source") ;;
  esac
done
flags=(-std=c++20 -g1 -O1 -Icsrc/include -Icsrc/testing -Icsrc/src -fno-omit-frame-pointer)
clang=$(command -v clang++ || command -v clang++-14 || true)
if [ -n "$clang" ]; then
  compiler=$clang
  flags+=(-fsanitize=address,undefined,fuzzer-no-link -fno-sanitize-recover=all)
  main=(-fsanitize=address,undefined,fuzzer)
  driver=()
else
  compiler=g++
  flags+=(-fsanitize=address,undefined -fno-sanitize-recover=all)
  main=(-fsanitize=address,undefined)
  driver=(-DLAYERWISE_FUZZ_DRIVER)
fi
object() { # source, its own flags: compiled if it, or any header, is newer
  local source=$1 out=$build/$(basename "$compiler")-${1//\//_}.o
  shift
  if [ ! -e "$out" ] || [ -n "$(find "$source" csrc/include csrc/src csrc/testing -name '*.h' -newer "$out" -o -path "$source" -newer "$out")" ]; then
    "$compiler" "${flags[@]}" "$@" -c "$source" -o "$out"
  fi
  objects+=("$out")
}
objects=()
watched=()
[ "$compiler" != g++ ] || watched=(-fsanitize-coverage=trace-pc)
for source in "${core[@]}"; do
  case $source in
    */shard_reader.cc | */block_runs.cc | */env.cc | */memory_file.cc) object "$source" "${watched[@]}" ;;
    *) object "$source" ;;
  esac
done
for source in "${vectors[@]}"; do
  case $source in
    *avx2*) object "$source" -mavx2 ;;
    *) object "$source" -mavx512f ;;
  esac
done
object tests/fuzz/shard_reader.cc "${driver[@]}"
"$compiler" "${main[@]}" "${objects[@]}" -luring -lpthread -o "$build/shard_reader"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
if [ -n "$clang" ]; then
  "$build/shard_reader" "$build/corpus" -max_total_time="$seconds" -seed="$seed" -max_len=512 -artifact_prefix="$build/crash-" -print_final_stats=1
else
  "$build/shard_reader" "$build/corpus" "$seconds" "$seed"
fi
