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
export PATH=$PATH:/usr/sbin:/sbin  # mke2fs, depmod: for users whose PATH leaves them out
vm=build/vm
timeout_s=${LAYERWISE_VM_TIMEOUT:-900}
long=${1:-}
tests=build/native-plain/layerwise_native_tests
qemu=
work=

skip() {
  echo "SKIP: tests in a virtual machine: $1"
  exit 0
}

fail() {
  echo "virtual machine: $1"
  exit 1
}

clean() {
  if [ -n "$qemu" ]; then
    kill "$qemu" 2>/dev/null || true
    wait "$qemu" 2>/dev/null || true
  fi
  [ -z "$work" ] || rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

missing_packages() {
  local pair
  for pair in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static mke2fs:e2fsprogs ndctl:ndctl depmod:kmod cpio:cpio; do
    command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
  done
}

# Debian's kernel, unpacked to build/vm/kernel.
fetch_kernel() {
  local package
  package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
  [ -n "$package" ] || skip "apt knows no linux-image-amd64"
  (cd "$vm" && rm -f linux-image-*.deb && apt-get download -q "$package") >"$vm/apt.log" 2>&1 ||
    skip "apt-get download $package failed, see $vm/apt.log"
  rm -rf "$vm/unpacked"
  dpkg -x "$vm/$package"_*.deb "$vm/unpacked"
  rm -f "$vm/$package"_*.deb
  depmod -b "$vm/unpacked" "${package#linux-image-}"
  mv "$vm/unpacked" "$vm/kernel"
}

build_tests() {
  bash tests/native.sh --build plain || fail "the native tests were not built"
}

# Copies a program, and the libraries that it needs, to the root of the machine. Without its symbols: half the size.
add_program() {
  local path library
  path=$(command -v "$1") || fail "$1 is missing"
  strip -o "$root/bin/$(basename "$1")" "$path"
  { ldd "$path" 2>/dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
  done
}

# Kernel modules with what they depend on, and the order in which to load them; without the rules of this system.
add_modules() {
  local version module
  version=$(basename "$vm"/kernel/lib/modules/*)
  mkdir -p "$root/modules"
  for module in crc32c_generic nvme nfit nd_pmem ext4; do
    modprobe -C /dev/null -d "$vm/kernel" -S "$version" --show-depends "$module" || fail "kernel $version has no module $module"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
  while read -r module; do
    cp "$module" "$root/modules/"
    basename "$module"
  done <"$work/modules" >"$root/modules/order"
}

pack_root() {
  root=$work/root
  mkdir -p "$root/bin"
  cp "$(command -v busybox)" "$root/bin/busybox"
  add_program ndctl
  add_program mke2fs
  add_modules
  add_program "./$tests"
  [ "$long" = --long ] || grep -lE 'DiskEnv|ScratchDir|ShardFixture' csrc/tests/*_test.cc | xargs -n 1 basename >"$root/on_disk"
  install -m 755 tests/vm/init.sh "$root/init"
  (cd "$root" && find . | cpio -o -H newc --quiet -R 0:0) | gzip -1 >"$work/initramfs.gz"
}

boot() {
  truncate -s 384M "$work/nvdimm" "$work/nvme"
  timeout -k 5 "$timeout_s" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 \
    -machine q35,nvdimm=on -m 1G,slots=2,maxmem=4G \
    -object memory-backend-file,id=m1,share=on,mem-path="$work/nvdimm",size=384M -device nvdimm,memdev=m1 \
    -drive file="$work/nvme",if=none,id=d0,format=raw,cache=unsafe \
    -device nvme,serial=x,drive=d0,logical_block_size=4096,physical_block_size=4096 \
    -kernel "$(echo "$vm"/kernel/boot/vmlinuz-*)" -initrd "$work/initramfs.gz" -append "console=ttyS0 quiet panic=-1" \
    -nographic -nodefaults -serial stdio -no-reboot </dev/null >"$vm/console.log" 2>&1 &
  qemu=$!
  local rc=0
  wait "$qemu" || rc=$?
  qemu=
  tr -d '\r' <"$vm/console.log" | grep -E '^(---|\[doctest\] (test cases|assertions)|logical blocks|VM-RESULT)' || true
  [ "$rc" != 124 ] || fail "not done after $timeout_s s; its console is in $vm/console.log"
  [ "$rc" = 0 ] || fail "qemu ended with exit code $rc; its console is in $vm/console.log"
  tr -d '\r' <"$vm/console.log" | grep -qx 'VM-RESULT OK' || {
    tr -d '\r' <"$vm/console.log" | grep -E -B 4 -A 6 'ERROR:|FATAL|VM-RESULT' | tail -n 100
    fail "tests failed in it; its console is in $vm/console.log"
  }
}

case $long in
  "" | --long) ;;
  *)
    echo "unknown: $long; allowed is --long" >&2
    exit 2
    ;;
esac
[ "$(uname -m)" = x86_64 ] || skip "it is built for x86_64, this machine is $(uname -m)"
for tool in apt-get apt-cache dpkg cmake; do
  command -v "$tool" >/dev/null || skip "$tool is missing"
done
mkdir -p "$vm"
packages=$(missing_packages)
if [ -n "$packages" ]; then
  [ "$(id -u)" = 0 ] || skip "missing, and only root can install: $(echo $packages)"
  # shellcheck disable=SC2086
  { apt-get update -q && apt-get install -q -y --no-install-recommends $packages; } >"$vm/apt.log" 2>&1 ||
    skip "apt-get install $(echo $packages) failed, see $vm/apt.log"
fi
[ -d "$vm/kernel" ] || fetch_kernel
work=$(mktemp -d "$vm/work-XXXXXX")
build_tests
pack_root
boot
