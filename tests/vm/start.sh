#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The beginning of each virtual machine's first process (see machine.sh); what follows is in an init.sh.
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /tmp
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev

end() {
  echo "VM-RESULT $1"
  sync
  poweroff -f
}

while read -r module; do
  insmod "/modules/$module" || end "FAIL: insmod $module"
done </modules/order
