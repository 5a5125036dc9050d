#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bash tests/vm/filesystems.sh [--here | --out FILE]: on which file systems saving, killing and coming back works, and how.
#
# ext4, xfs and btrfs in several ways, overlayfs, tmpfs and FUSE on this machine, where root may mount them; NFS over
# loopback, 9p and a quota in a virtual machine, which --here leaves out. Prints a table, and writes it to FILE,
# docs/tables/filesystems.md. Needs what tests/vm/powercut.sh needs; the programs of NFS and FUSE are unpacked below
# build/vm, never installed.
# LAYERWISE_VM_TIMEOUT is the deadline of the machine in seconds (3600).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
title="file systems"
timeout_s=${LAYERWISE_VM_TIMEOUT:-3600}
# shellcheck source=tests/vm/machine.sh
. tests/vm/machine.sh
console=$vm/filesystems.log
out=
machine_too=yes
case "$# ${1:-}" in
  "0 ") ;;
  "1 -h" | "1 --help") usage tests/vm/filesystems.sh ;;
  "1 --here") machine_too= ;;
  "2 --out") out=$2 ;;
  *)
    echo "unknown: $*; allowed is --here or --out FILE" >&2
    exit 2
    ;;
esac
[ "$(id -u)" = 0 ] || skip "only root can mount them"
prepare mke2fs:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs losetup:mount unshare:util-linux
fetch_programs nfs-kernel-server nfs-common libnfsidmap1 libwrap0 libevent-core-2.1-7 bindfs libfuse2 python3-fusepy
find_python
SECONDS=0

loops=()
detach() { for loop in ${loops[@]+"${loops[@]}"}; do losetup --detach "$loop" 2>/dev/null || true; done; }
trap 'detach; clean' EXIT

try_here() {
  local rc=0
  truncate -s 384M "$work/small" "$work/large"
  loops+=("$(losetup --find --show "$work/small")")
  loops+=("$(losetup --find --show --sector-size 4096 "$work/large")")
  SMALL_DISK=${loops[0]} LARGE_DISK=${loops[1]} OMP_NUM_THREADS=1 LD_LIBRARY_PATH=$program_libraries \
    PYTHONPATH=tests:tests/vm/guest:$programs/usr/lib/python3/dist-packages FUSE_LIBRARY_PATH=libfuse.so.2 \
    unshare --mount --propagation private "$python" tests/vm/guest/filesystems.py local "$work/needs" >"$work/here" 2>&1 || rc=$?
  return "$rc"
}

report() { tr -d '\r' <"$1" | grep -E '^(WRONG|.*: [0-9]+ s$)' || true; }

here=0
rc=0
try_here || here=$?
report "$work/here"
if [ -n "$machine_too" ]; then
  guest_environment="SMALL_DISK=/dev/vda LARGE_DISK=/dev/vdb LD_LIBRARY_PATH=$program_libraries PATH=\$PATH:$programs/usr/sbin"
  begin_python_root tests/vm/guest/filesystems.py shared "$PWD/$work/needs"
  add_modules crc32c_generic virtio_pci virtio_blk 9pnet_virtio 9p ext4 nfsd nfsv4 quota_v2
  pack_root
  add_disks small:384M:512 large:384M:4096
  mkdir -p "$work/shared"
  boot "$console" "${with_python[@]}" "${disks[@]}" -fsdev "local,id=shared,path=$work/shared,security_model=mapped-xattr" \
    -device virtio-9p-pci,fsdev=shared,mount_tag=shared || rc=$?
  report "$console"
else
  console=/dev/null
fi
{
  cat tests/vm/filesystems_head.md
  echo "Made on $(date +%F) by"
  printf '\n    bash tests/vm/filesystems.sh --out docs/tables/filesystems.md\n\n'
  echo "on Linux $(uname -r | cut -d - -f 1); NFS, 9p and the quota in a virtual machine, on Debian's $(basename "$vm"/kernel/lib/modules/* | cut -d - -f 1-2)."
  echo
  echo "| file system | made by | doctor | I/O | retired files | killed and restored |"
  echo "|---|---|---|---|---|---|"
  cat "$work/here" "$console" | tr -d '\r' | sed -n 's/^.*ROW |/|/p'
} >"$work/table"
cat "$work/table"
[ "$here" = 0 ] || { tail -n 60 "$work/here"; fail "not all of it works on this machine"; }
[ -z "$machine_too" ] || judge "$rc" "$console" 'Error|WRONG|VM-RESULT' "not all of it works in the virtual machine"
[ -z "$out" ] || cp "$work/table" "$out"
echo "file systems: $((SECONDS / 60)) min $((SECONDS % 60)) s"
