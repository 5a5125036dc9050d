# SPDX-License-Identifier: Apache-2.0
# The first process of the virtual machine of run.sh, after start.sh: makes the two file systems, runs the tests on each,
# powers off.
mkdir -p /pmem /nvme

waited=0
while [ ! -b /dev/nvme0n1 ] || [ ! -b /dev/pmem0 ]; do
  waited=$((waited + 1))
  [ "$waited" -le 200 ] || end "FAIL: /dev/nvme0n1 or /dev/pmem0 did not appear"
  usleep 100000
done

# By their paths: busybox has programs of the same names.
# A fresh NVDIMM is in raw mode, which has no DAX.
/bin/ndctl create-namespace -f -e namespace0.0 -m fsdax >/tmp/ndctl 2>&1 || { cat /tmp/ndctl; end "FAIL: ndctl"; }
/bin/mke2fs -q -F -t ext4 -b 4096 /dev/pmem0 && mount -t ext4 -o dax=always /dev/pmem0 /pmem || end "FAIL: /pmem"
/bin/mke2fs -q -F -t ext4 /dev/nvme0n1 && mount -t ext4 /dev/nvme0n1 /nvme || end "FAIL: /nvme"
echo "logical blocks of the NVMe disk: $(cat /sys/block/nvme0n1/queue/logical_block_size) bytes"

chosen=
if [ -e /on_disk ]; then
  export LAYERWISE_TEST_SHORT=16
  while read -r file; do chosen="$chosen,*/$file"; done </on_disk
fi
run() { env "$@" /bin/layerwise_native_tests --no-colors=true --duration=true ${chosen:+"--source-file=${chosen#,}"}; }

failed=
echo "--- the native tests on persistent memory: ext4 -o dax, NvmEnv"
run LAYERWISE_TEST_DIR=/pmem LAYERWISE_TEST_BACKEND=nvm || failed="$failed /pmem"
echo "--- the native tests on an NVMe disk with sectors of 4096 bytes: ext4, PosixEnv"
run LAYERWISE_TEST_DIR=/nvme LAYERWISE_TEST_ALIGN=4096 || failed="$failed /nvme"
if [ -n "$failed" ]; then end "FAIL: tests on$failed"; fi
umount /pmem && umount /nvme || end "FAIL: something still uses the file systems"
end OK
