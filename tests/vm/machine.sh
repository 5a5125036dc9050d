# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts that boot a virtual machine: its kernel, its first file system, and what is done when it ends.
# REQUIRES: set -euo pipefail; the working directory is the project's; `title` says what is tried, `timeout_s` is the
# deadline of one machine in seconds.
export PATH=$PATH:/usr/sbin:/sbin # mke2fs, depmod: for users whose PATH leaves them out
vm=build/vm
qemu=
work=
guest_environment= # of the program that `begin_python_root` runs: NAME=VALUE...
# The machine of `begin_python_root`.
with_python=(-machine q35 -m 2G -device "virtio-9p-pci,fsdev=host,mount_tag=host"
  -fsdev "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap")

# What a script says of itself, after its license.
usage() {
  sed -n '3,/^set /s/^# \{0,1\}//p' "$1"
  exit 0
}

skip() {
  echo "SKIP: $title: $1"
  exit 0
}

fail() {
  echo "$title: $1"
  exit 1
}

clean() {
  if [ -n "$qemu" ]; then
    kill "$qemu" 2>/dev/null || true
    wait "$qemu" 2>/dev/null || true
  fi
  [ -z "$work" ] || rm -rf "$work"
}

# Pairs PROGRAM:PACKAGE, installed where root runs this; makes $work.
prepare() {
  local tool pair packages=
  [ "$(uname -m)" = x86_64 ] || skip "it is built for x86_64, this machine is $(uname -m)"
  for tool in apt-get apt-cache dpkg cmake; do
    command -v "$tool" >/dev/null || skip "$tool is missing"
  done
  mkdir -p "$vm"
  for pair in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static depmod:kmod cpio:cpio "$@"; do
    command -v "${pair%%:*}" >/dev/null || packages="$packages ${pair##*:}"
  done
  if [ -n "$packages" ]; then
    [ "$(id -u)" = 0 ] || skip "missing, and only root can install:$packages"
    # shellcheck disable=SC2086
    { apt-get update -q && apt-get install -q -y --no-install-recommends $packages; } >"$vm/apt.log" 2>&1 ||
      skip "apt-get install$packages failed, see $vm/apt.log"
  fi
  [ -d "$vm/kernel" ] || fetch_kernel
  trap clean EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  work=$(mktemp -d "$vm/work-XXXXXX")
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

# Packages of programs that are not installed, since that would start daemons: unpacked to build/vm/programs.
fetch_programs() {
  local package
  programs=$PWD/$vm/programs
  mkdir -p "$programs"
  for package; do
    [ ! -e "$programs/$package.fetched" ] || continue
    (cd "$vm" && rm -f "$package"_*.deb && apt-get download -q "$package") >"$vm/apt.log" 2>&1 ||
      skip "apt-get download $package failed, see $vm/apt.log"
    dpkg -x "$vm/$package"_*.deb "$programs"
    rm -f "$vm/$package"_*.deb
    touch "$programs/$package.fetched"
  done
  export PATH=$PATH:$programs/usr/sbin:$programs/usr/bin:$programs/sbin
  program_libraries=$programs/usr/lib/x86_64-linux-gnu:$programs/lib/x86_64-linux-gnu
}

# The interpreter of the tests, and in $work/needs what the job imports.
find_python() {
  python=${LAYERWISE_VENV:-$PWD/.venv}/bin/python
  [ -x "$python" ] || fail "$python is missing: run launch/setup.sh first"
  PYTHONPATH=tests:tests/vm/guest "$python" tests/vm/guest/needs.py "$work/needs" >"$work/needs.log" 2>&1 || {
    cat "$work/needs.log"
    fail "the job does not run on this machine"
  }
}

# The machine's first process runs a program of tests/vm/guest with this machine's packages; "$@" is its command line.
begin_python_root() {
  begin_root tests/vm/guest/init.sh
  {
    echo "cd '$PWD' && export PYTHONPATH=tests:tests/vm/guest $guest_environment"
    echo "exec '$python' $*"
  } >"$root/program"
}

# Disks for `boot`: NAME:SIZE:SECTOR... as files of $work, and their arguments in `disks`.
add_disks() {
  local name size sector slot=16 function=0
  rm -f "$work"/disk-*
  disks=()
  # Eight in a slot of the bus, which has 32.
  while IFS=: read -r name size sector; do
    truncate -s "$size" "$work/disk-$name"
    disks+=(-drive "file=$work/disk-$name,if=none,id=$name,format=raw,cache=unsafe,discard=unmap"
      -device "virtio-blk-pci,drive=$name,serial=$name,logical_block_size=$sector,physical_block_size=$sector,addr=$(printf '%x.%x' $slot $function),multifunction=on")
    function=$(((function + 1) % 8)) slot=$((slot + (function == 0)))
  done < <(printf '%s\n' "$@")
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
  for module; do
    modprobe -C /dev/null -d "$vm/kernel" -S "$version" --show-depends "$module" || fail "kernel $version has no module $module"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
  while read -r module; do
    cp "$module" "$root/modules/"
    basename "$module"
  done <"$work/modules" >"$root/modules/order"
}

# The first file system of the machine: busybox, the modules, and its first process, which is start.sh and then $1.
begin_root() {
  root=$work/root
  rm -rf "$root"
  mkdir -p "$root/bin"
  cp "$(command -v busybox)" "$root/bin/busybox"
  cat tests/vm/start.sh "$1" >"$root/init"
  chmod 755 "$root/init"
}

pack_root() {
  (cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) | gzip -1 >"$work/initramfs.gz"
}

# Boots it with further arguments of qemu's; $1 is the file of its console. Returns once it is off, 124 at its deadline.
boot() {
  local console=$1 rc=0
  describe "${@:2}"
  timeout -k 5 "$timeout_s" "${machine[@]}" </dev/null >"$console" 2>&1 &
  qemu=$!
  wait "$qemu" || rc=$?
  qemu=
  return "$rc"
}

# Emulated, since KVM is rarely at hand; LAYERWISE_VM_ACCEL=kvm uses it.
describe() {
  machine=(qemu-system-x86_64 -accel "${LAYERWISE_VM_ACCEL:-tcg,thread=multi}" -cpu max -smp 2
    -kernel "$(echo "$vm"/kernel/boot/vmlinuz-*)" -initrd "$work/initramfs.gz" -append "console=ttyS0 quiet panic=-1"
    -nographic -nodefaults -serial stdio -no-reboot "$@")
}

# Lets it run until its console, $1, has $3 lines that are $2, and for $4 seconds more; then ends it at once, as a power
# cut. Further arguments as `boot`.
boot_and_kill() {
  local console=$1 line=$2 count=$3 more=$4 waited=0
  describe "${@:5}"
  : >"$console" # it is read at once
  "${machine[@]}" </dev/null >"$console" 2>&1 &
  qemu=$!
  until [ "$(tr -d '\r' <"$console" | grep -cx "$line")" -ge "$count" ]; do
    kill -0 "$qemu" 2>/dev/null || fail "it ended before it had said '$line' $count times; its console is in $console"
    waited=$((waited + 1))
    [ "$waited" -le $((timeout_s * 5)) ] ||
      fail "it had not said '$line' $count times after $timeout_s s; its console is in $console"
    sleep 0.2
  done
  sleep "$more"
  kill -KILL "$qemu"
  wait "$qemu" 2>/dev/null || true
  qemu=
  [ "$(tail -c 1 "$console" | wc -l)" = 1 ] || sed -i '$d' "$console" # of a line that it was just saying
}

# Of a machine that has ended with $1: fails unless it said that all went well. $2 is its console; what follows are
# expressions of grep for what tells why.
judge() {
  local rc=$1 console=$2
  [ "$rc" != 124 ] || fail "not done after $timeout_s s; its console is in $console"
  [ "$rc" = 0 ] || fail "qemu ended with exit code $rc; its console is in $console"
  tr -d '\r' <"$console" | grep -qx 'VM-RESULT OK' || {
    tr -d '\r' <"$console" | grep -E -B 4 -A 6 "$3" | tail -n 100
    fail "$4; its console is in $console"
  }
}
