# SPDX-License-Identifier: Apache-2.0
# The first process of a virtual machine, after start.sh, that runs a Python program of the tests with this machine's own
# packages: its root is given to it over 9p, read-only. What is run is in /program, under the root.
mkdir -p /host

mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host || end "FAIL: the root over 9p"
mount -t proc none /host/proc && mount -t sysfs none /host/sys && mount -t devtmpfs none /host/dev &&
  mount -t tmpfs none /host/tmp && mkdir -p /host/dev/shm && mount -t tmpfs none /host/dev/shm || end "FAIL: mounts"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 DM_DISABLE_UDEV=1
ifconfig lo 127.0.0.1 up 2>/dev/null
if chroot /host /bin/sh -c "$(cat /program)"; then end OK; fi
end FAIL
