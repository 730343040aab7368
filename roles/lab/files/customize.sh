#!/bin/sh
# mmdebstrap customize hook ($1 = root of the new system): prepares it to boot as a container.
set -eu
root=$1

# Every node generates its own host keys at first start; the image contains none.
rm -f "$root"/etc/ssh/ssh_host_*
mkdir -p "$root/etc/systemd/system/ssh.service.d"
cat >"$root/etc/systemd/system/ssh.service.d/host-keys.conf" <<'UNIT'
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
UNIT

# Units that need hardware or a console, which a container lacks.
for unit in systemd-udevd.service systemd-udevd-kernel.socket systemd-udevd-control.socket \
  systemd-udev-trigger.service systemd-modules-load.service systemd-logind.service \
  getty.target console-getty.service sys-kernel-debug.mount sys-kernel-tracing.mount; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

# On a hybrid host (cgroup v1 and v2) podman's nodes share one name=systemd hierarchy, and a stopping node removes the
# cgroups of the others, whose engines then cannot start containers. No program in a node needs it.
cat >"$root/etc/systemd/system/forget-shared-hierarchy.service" <<'UNIT'
[Unit]
Description=Unmount the hierarchy that nodes of a hybrid host share
DefaultDependencies=no
Before=sysinit.target
ConditionPathIsMountPoint=/sys/fs/cgroup/systemd
ConditionPathIsMountPoint=/sys/fs/cgroup/unified
[Service]
Type=oneshot
ExecStart=/bin/umount --lazy /sys/fs/cgroup/systemd
UNIT
mkdir -p "$root/etc/systemd/system/sysinit.target.wants"
ln -s ../forget-shared-hierarchy.service "$root/etc/systemd/system/sysinit.target.wants/"

# No package lists, which would be stale. The old date of their folder triggers an update.
rm -rf "$root"/var/lib/apt/lists/*
touch -d @0 "$root/var/lib/apt/lists"
rm -f "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin

# Without dpkg's syncs; a damaged lab node is recreated rather than repaired.
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io"
rm -f "$root"/etc/hostname "$root"/etc/resolv.conf "$root"/etc/machine-id
: >"$root/etc/machine-id"
