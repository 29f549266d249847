#!/bin/busybox sh
# The first program of the guest: this machine's own files, read-only, under a layer that goes with the guest.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do
    insmod "/modules/$module"
done

nine() { # tag folder options
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2"
}
nine host /lower ro,cache=loose || { echo "the guest cannot mount its files"; poweroff -f; }
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work root /root
for folder in proc sys dev; do
    mount --move "/$folder" "/root/$folder"
done
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts pts /root/dev/pts
for folder in tmp run dev/shm; do
    mount -t tmpfs "$folder" "/root/$folder"
done
chmod 1777 /root/tmp /root/dev/shm
modules="/root/usr/lib/modules/$(uname -r)"
mkdir -p "$modules" /root/run/guest
nine modules "$modules" ro,cache=loose
nine guest /root/run/guest cache=none
exec switch_root /root /bin/sh /run/guest/start
