#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/vm/run.sh [--long]: the native tests once more on hardware that few machines have, in a virtual machine.
#
# One boot runs them twice: on persistent memory (an emulated NVDIMM, ext4 -o dax, the files of NvmEnv) and on an NVMe
# disk with sectors of 4096 bytes (so that alignment is not always 512). It emulates every instruction, so neither KVM
# nor root is needed to run it. It says nothing about the speed of such hardware, and nothing about power loss: what a
# flush covers is what the kernel says it covers.
#
# By default it runs the test files in which something is on a disk, with shorter sweeps; with --long all of them, whole.
# tests/native.sh runs all of them, whole, on this machine.
#
# Needs Debian or Ubuntu: the kernel is downloaded by apt-get and unpacked below build/vm, never installed. Programs that
# are missing are installed by apt-get when root runs this. Where that is not possible it prints "SKIP: <why>" and
# succeeds. LAYERWISE_VM_TIMEOUT is the deadline of the machine in seconds (900: it is emulated, and
# the Python tests run beside it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
title="tests in a virtual machine"
timeout_s=${LAYERWISE_VM_TIMEOUT:-900}
# shellcheck source=tests/vm/machine.sh
. tests/vm/machine.sh
long=${1:-}
tests=build/native-plain/layerwise_native_tests
console=$vm/console.log
case $long in
  "" | --long) ;;
  -h | --help) usage tests/vm/run.sh ;;
  *)
    echo "unknown: $long; allowed is --long" >&2
    exit 2
    ;;
esac
prepare mke2fs:e2fsprogs ndctl:ndctl
bash tests/native.sh --build plain || fail "the native tests were not built"

begin_root tests/vm/init.sh
add_program ndctl
add_program mke2fs
add_modules crc32c_generic nvme nfit nd_pmem ext4
add_program "./$tests"
[ "$long" = --long ] || grep -lE 'DiskEnv|ScratchDir|ShardFixture' csrc/tests/*_test.cc | xargs -n 1 basename >"$root/on_disk"
pack_root

truncate -s 384M "$work/nvdimm" "$work/nvme"
rc=0
boot "$console" -machine q35,nvdimm=on -m 1G,slots=2,maxmem=4G \
  -object memory-backend-file,id=m1,share=on,mem-path="$work/nvdimm",size=384M -device nvdimm,memdev=m1 \
  -drive file="$work/nvme",if=none,id=d0,format=raw,cache=unsafe \
  -device nvme,serial=x,drive=d0,logical_block_size=4096,physical_block_size=4096 || rc=$?
tr -d '\r' <"$console" | grep -E '^(---|\[doctest\] (test cases|assertions)|logical blocks|VM-RESULT)' || true
judge "$rc" "$console" 'ERROR:|FATAL|VM-RESULT' "tests failed in it"
