# shellcheck shell=bash disable=SC2034,SC2154 # shares its variables with images/build
# The test suite's guest: busybox and the stock Debian cloud kernel with just the modules it needs.

DESCRIPTION="tiny: busybox on the stock Debian cloud kernel, for tests"
PACKAGES=(busybox-static)
SIZE_MIB=96
DEFAULT_USER=root
CMDLINE="rw console=ttyS0 quiet panic=1"

# Needed to find the root disk; the rest is loaded from there.
BOOT_MODULES=(virtio_pci virtio_blk)
ROOT_MODULES=(virtio_net virtio_rng virtio_balloon virtio_console vmw_vsock_virtio_transport button evdev
    loop vfat nls_cp437 nls_ascii isofs xfs)

# copy_modules FROM TO NAME...: the modules and what they depend on, and a modules.dep that fits.
copy_modules() {
    local from=$1 to=$2 module path
    shift 2
    mkdir -p "$to/lib/modules/$KERNEL_VERSION"
    for module; do
        while read -r path; do
            case $path in
                insmod\ *)
                    path=${path#insmod }
                    unpack_module "$KERNEL_VERSION" "$(basename "${path%%.ko*}")" \
                        "$to/lib/modules/$KERNEL_VERSION" "$from" ;;
            esac
        done < <(modprobe -d "$from" -S "$KERNEL_VERSION" --show-depends "$module" 2>/dev/null ||
            echo "insmod missing/$module.ko")
    done
    cp -L "$from/lib/modules/$KERNEL_VERSION/modules.builtin" "$from/lib/modules/$KERNEL_VERSION/modules.order" \
        "$to/lib/modules/$KERNEL_VERSION/"
    depmod -b "$to" "$KERNEL_VERSION" 2>/dev/null
    # busybox reads modules.dep alone; the binary indexes are kmod's.
    (cd "$to/lib/modules/$KERNEL_VERSION" && rm -f modules.order modules.builtin* modules.*.bin modules.devname \
        modules.softdep modules.symbols)
}

make_tree() {
    local tree=$1 kernel=$work/kernel applet
    mkdir -p "$tree"/{bin,boot,dev,etc,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin,var/log,mnt}
    kernel_files "$kernel"
    KERNEL_VERSION=$(basename "$(echo "$kernel"/boot/vmlinuz-*)")
    KERNEL_VERSION=${KERNEL_VERSION#vmlinuz-}
    cp -p "$kernel/boot/vmlinuz-$KERNEL_VERSION" "$tree/boot/"
    copy_modules "$kernel" "$tree" "${ROOT_MODULES[@]}"
    install -m 755 /bin/busybox "$tree/bin/busybox"
    while read -r applet; do
        [[ $applet == busybox ]] || ln -s /bin/busybox "$tree/bin/$applet"
    done < <(/bin/busybox --list)
    rm "$tree"/bin/{init,poweroff,reboot,halt}
    ln -s /bin/busybox "$tree/sbin/init"
    cp -r "$images/tiny/root/." "$tree/"
    chmod -R u=rwX,go=rX "$tree/etc" "$tree/sbin" "$tree/usr"
    # Links are left alone: theirs would be the files of this machine.
    find "$tree/sbin" "$tree/etc/init.d" "$tree/etc/acpi" "$tree/usr/share/udhcpc" -type f -exec chmod 755 {} +
    chmod 1777 "$tree/tmp"
    chmod 700 "$tree/root"
}

# Uncompressed: unpacking it is what an emulated CPU would spend the time on.
make_boot() {
    local tree=$1 initrd=$work/initrd
    mkdir -p "$initrd"/{bin,dev,proc,sys,newroot}
    cp "$tree/bin/busybox" "$initrd/bin/"
    ln -s busybox "$initrd/bin/sh"
    install -m 755 "$images/tiny/initrd-init" "$initrd/init"
    copy_modules "$work/kernel" "$initrd" "${BOOT_MODULES[@]}"
    pack_initrd "$initrd" "$tree/boot/initrd.img-$KERNEL_VERSION" cat
    write_boot_entry "$tree" tiny
}
