# shellcheck shell=bash disable=SC2034,SC2154 # shares its variables with images/build
# Debian 12 as an AMI: systemd, OpenSSH, cloud-init and the stock cloud kernel.

DESCRIPTION="Debian 12 (bookworm), amd64"
PACKAGES=(mmdebstrap debian-archive-keyring)
SIZE_MIB=2048
DEFAULT_USER="admin"
CMDLINE="ro console=ttyS0 net.ifnames=0 quiet"

INSTALL=(
    systemd systemd-sysv systemd-resolved systemd-timesyncd udev dbus libpam-systemd libnss-myhostname
    linux-image-cloud-amd64 initramfs-tools lz4 zstd kmod
    cloud-init cloud-guest-utils isc-dhcp-client openssh-server openssh-client sudo
    apt-utils bash-completion ca-certificates curl e2fsprogs fdisk iproute2 iputils-ping less lsb-release nano
    netbase procps psmisc tzdata vim-tiny wget
)
# Nothing of these helps a machine that lives in a cloud, and each costs time at boot.
MASK=(apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service systemd-pstore.service
    getty@tty1.service)

# sources: one-line apt sources for bookworm, this machine's own if it is a Debian 12 itself.
sources() {
    local suite lines
    if [[ -n ${IMAGES_MIRROR:-} ]]; then
        for suite in bookworm bookworm-updates; do echo "deb $IMAGES_MIRROR $suite main"; done
        return
    fi
    lines=$(apt-get indextargets --format $'$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        sed -n 's/^Debian \(deb [^ ]* bookworm\(\|-updates\|-security\) main\)$/\1/p' | sort -u)
    if [[ $lines != *" bookworm main"* ]]; then
        die "this machine's apt knows no bookworm: set IMAGES_MIRROR to the URL of a Debian mirror"
    fi
    printf '%s\n' "$lines"
}

# source_date: when the newest of the package lists was made; the packages are as old or older.
source_date() {
    local newest=0 date file
    for file in /var/lib/apt/lists/*bookworm*_InRelease; do
        date=$(date -d "$(sed -n 's/^Date: //p;/^SHA256:/q' "$file" | head -n 1)" +%s 2>/dev/null) || continue
        ((date > newest)) && newest=$date
    done
    ((newest)) || newest=$(date -d "$(date +%F)" +%s)
    echo "$newest"
}

make_tree() {
    local tree=$1 options=() line unit
    ((EUID == 0)) || die "debian-12 needs root (it installs packages in a chroot)"
    epoch=${epoch:-$(source_date)}
    while IFS= read -r line; do
        options+=("--aptopt=$line")
    done < <(apt-config dump | grep -E '^Acquire::(https?::(Proxy|Timeout)|Check-Valid-Until|Check-Date|Retries)[: ]')
    mkdir "$work/overlay"
    cp -r "$images/debian-12/root/." "$work/overlay/"
    chmod -R u=rwX,go=rX "$work/overlay"
    chmod 755 "$work"/overlay/etc/kernel/*.d/*
    echo "root=UUID=$(uuid_for debian-12 filesystem) $CMDLINE" >"$work/overlay/etc/kernel/cmdline"
    echo "UUID=$(uuid_for debian-12 filesystem) / ext4 rw,discard,errors=remount-ro 0 1" >"$work/overlay/etc/fstab"
    sources >"$work/sources.list"
    # The overlay comes before the packages, so that the kernel's own hooks make the initrd and boot entry.
    SOURCE_DATE_EPOCH=$epoch mmdebstrap --quiet --variant=minbase --format=directory --mode=root \
        --aptopt='APT::Install-Recommends "false"' "${options[@]}" --dpkgopt=force-unsafe-io \
        --include="$(IFS=, && echo "${INSTALL[*]}")" \
        --essential-hook="cp -a '$work/overlay/.' \"\$1/\"" \
        bookworm "$tree" "$work/sources.list" >"$work/log" 2>&1 </dev/null || {
        tail -n 30 "$work/log" >&2
        die "mmdebstrap failed"
    }
    KERNEL_VERSION=$(basename "$(echo "$tree"/boot/vmlinuz-*-cloud-amd64)")
    KERNEL_VERSION=${KERNEL_VERSION#vmlinuz-}

    systemctl --root="$tree" --quiet enable systemd-networkd.service systemd-networkd-wait-online.service
    for unit in "${MASK[@]}"; do ln -sf /dev/null "$tree/etc/systemd/system/$unit"; done
    # With SOURCE_DATE_EPOCH set Python compiled its modules so that each import reads the source, too. Time
    # stamps serve as well, for those of packages never change.
    find "$tree/usr" -name '*.py' -newermt "@$epoch" -exec touch -d "@$epoch" {} +
    env -i PATH="$PATH" chroot "$tree" python3 -m compileall -qf --invalidation-mode timestamp /usr/lib/python3 \
        /usr/lib/python3.11 >"$work/log" 2>&1 || say "some Python modules do not compile: $(tail -n 1 "$work/log")"
    mv "$tree"/etc/apt/sources.list.d/*sources.list "$tree/etc/apt/sources.list"
    clean "$tree"
}

# What differs from build to build or must differ from instance to instance.
clean() {
    local tree=$1
    rm -rf "$tree"/etc/ssh/ssh_host_* "$tree"/var/lib/systemd/random-seed "$tree"/var/lib/dbus/machine-id \
        "$tree"/etc/{passwd,group,shadow,gshadow,subuid,subgid}- "$tree"/var/lib/dpkg/*-old \
        "$tree"/var/cache/debconf/*-old "$tree"/var/cache/ldconfig/* "$tree"/var/cache/apt/*.bin \
        "$tree"/var/lib/apt/lists/* "$tree"/etc/apt/apt.conf.d/99mmdebstrap \
        "$tree"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$tree"/etc/hostname "$tree"/root/.wget-hsts
    find "$tree/var/log" -type f -delete
    find "$tree/tmp" "$tree/var/tmp" "$tree/run" -mindepth 1 -delete
    : >"$tree/etc/machine-id"
    echo debian >"$tree/etc/hostname"
    ln -sf ../run/systemd/resolve/stub-resolv.conf "$tree/etc/resolv.conf"
}

# The packages' own hooks made the initrd and the boot entry already.
make_boot() {
    local tree=$1
    [[ -s $tree/boot/initrd.img-$KERNEL_VERSION ]] || die "the kernel package made no initrd"
    grep -q "^options  *root=UUID=" "$tree/boot/loader/entries/debian-$KERNEL_VERSION.conf" || die "no boot entry"
}
