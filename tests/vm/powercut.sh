#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/vm/powercut.sh [--drawn N] [--seed N] [FILE_SYSTEM-SECTOR...]: cuts the power of a small training job.
#
# In a virtual machine, once for each of ext4, xfs and btrfs on disks with sectors of 512 and of 4096 bytes, a job is
# killed, comes back, and rolls back, while dm-log-writes records what its disk is told; marks in the same log say
# which steps the job was promised. Then the machine itself is killed while it runs the job on all three file systems, on disks
# that QEMU logs in the same format.
#
# On this machine the logs are replayed: up to each flush, each write that bypasses the cache and each mark, and N
# times (20) up to somewhere between, where a disk keeps some of the writes, or some sectors of them; of the machine that was
# killed, up to the last flush, with N different parts of what followed. After each of these cuts the file system is
# mounted, and a restart must restore the step that was promised last, or one that was begun after it, with exactly the
# contents that the training has without checkpoints; after every eighth it also trains on, saves and restores once more.
# Careless jobs must be found, on each: they announce commits without the flush of the manifest's folder, of what is in
# the manifest, or of what is in the shards (tests/vm/guest/careless.py).
#
# A seed and a log give the same cuts again: what fails is left in build/vm/powercut, with the command that repeats it.
#
# For root, who may mount the images; the machine emulates every instruction, so KVM is not needed. Needs what
# tests/vm/run.sh needs, the programs that make these file systems, and .venv (launch/setup.sh). The machine reads this
# one's files, and writes none. LAYERWISE_VM_TIMEOUT is the machine's deadline in seconds (3600).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
title="power cuts in a virtual machine"
timeout_s=${LAYERWISE_VM_TIMEOUT:-3600}
# shellcheck source=tests/vm/machine.sh
. tests/vm/machine.sh
console=$vm/powercut.log
drawn=20
seed=$((RANDOM * 32768 + RANDOM))
wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage tests/vm/powercut.sh ;;
    --drawn | --seed)
      [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "$1 needs a number" >&2; exit 2; }
      case $1 in --drawn) drawn=$2 ;; --seed) seed=$2 ;; esac
      shift 2
      ;;
    ext4-512 | ext4-4096 | xfs-512 | xfs-4096 | btrfs-512 | btrfs-4096)
      wanted+=("$1")
      shift
      ;;
    *)
      echo "unknown: $1; there are --drawn N, --seed N, and ext4, xfs, btrfs with -512 or -4096" >&2
      exit 2
      ;;
  esac
done
[ ${#wanted[@]} -gt 0 ] || wanted=(ext4-512 ext4-4096 xfs-512 xfs-4096 btrfs-512 btrfs-4096)
[ "$(id -u)" = 0 ] || skip "only root can mount what a cut leaves"
mapfile -t kinds < <(printf '%s\n' "${wanted[@]%-*}" | sort -u)
for kind in "${kinds[@]}"; do
  grep -qw "$kind" /proc/filesystems || modprobe "$kind" 2>/dev/null || skip "this kernel has no $kind"
done
prepare mke2fs:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs dmsetup:dmsetup losetup:mount unshare:util-linux

names=()
for each in "${wanted[@]}"; do names+=("$each" "$each-folder" "$each-manifest" "$each-shards"); done
log_options=log-sector-size=512,log-super-update-interval=1
SECONDS=0
echo "recording ${wanted[*]}: seed $seed, $drawn cuts drawn for each"
find_python
begin_python_root tests/vm/guest/record.py "$PWD/$work/needs" "${names[@]}"
add_modules crc32c_generic virtio_pci virtio_blk 9pnet_virtio 9p dm-log-writes "${kinds[@]}"
pack_root
add_disks disk-512:384M:512 disk-4096:384M:4096 "${names[@]/%/:2G:512}"
for kind in "${kinds[@]}"; do
  truncate -s 384M "$work/killed-$kind"
  truncate -s 2G "$work/killed-$kind.log"
  disks+=(-blockdev "driver=file,node-name=$kind-disk,filename=$work/killed-$kind"
    -blockdev "driver=file,node-name=$kind-log,filename=$work/killed-$kind.log"
    -blockdev "driver=blklogwrites,node-name=$kind,file=$kind-disk,log=$kind-log,${log_options}"
    -device "virtio-blk-pci,drive=$kind,serial=killed-$kind")
done
# Each says it some 17 times until its last session, and then for a minute or more.
boot_and_kill "$console" 'SAID [^ ]* must .*' $((${#kinds[@]} * (4 + RANDOM % 10))) "0.$((RANDOM % 10))" \
  "${with_python[@]}" "${disks[@]}"
tr -d '\r' <"$console" | grep -E '^RECORDED' || true
echo "recorded, and killed: $((SECONDS / 60)) min $((SECONDS % 60)) s"
tr -d '\r' <"$console" | sed -n 's/^STATES //p' >"$work/states"

total=0
violations=0
failed=
left=$vm/powercut
rm -rf "$left"
run_replay=(unshare --mount --propagation private env PYTHONPATH=tests:tests/vm/guest OMP_NUM_THREADS=1
  "$python" tests/vm/replay.py)
# A name, the file of its log, and one with what the job said.
replay() {
  local out=$work/replay.log counts
  "${run_replay[@]}" "$1" "$2" "$work/states" --drawn "$drawn" --seed "$seed" ${3:+--said "$3"} >"$out" 2>&1 ||
    keep "$@"
  grep -E '^(CUTS|VIOLATION|MUTATION)' "$out" || cat "$out"
  counts=$(sed -nE 's/^CUTS ([0-9]+) VIOLATIONS ([0-9]+).*/\1 \2/p' "$out")
  [ -z "$counts" ] || { total=$((total + ${counts% *})) violations=$((violations + ${counts#* })); }
}
keep() {
  failed="$failed $1"
  mkdir -p "$left"
  cp --sparse=always "$2" ${3:+"$3"} "$work/states" "$work/needs" "$left/"
  echo "to repeat it: ${run_replay[*]} $1 $left/${2##*/} $left/states --drawn $drawn --seed $seed${3:+ --said $left/${3##*/}}"
}
for name in "${names[@]}"; do replay "$name" "$work/disk-$name"; done
for kind in "${kinds[@]}"; do
  tr -d '\r' <"$console" | sed -n "s/^SAID $kind //p" >"$work/said-$kind"
  replay "$kind-killed" "$work/killed-$kind.log" "$work/said-$kind"
done
echo "$total power cuts, $violations violations, seed $seed: $((SECONDS / 60)) min $((SECONDS % 60)) s"
[ -z "$failed" ] || fail "seed $seed: failed:$failed"
