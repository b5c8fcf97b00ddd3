# shellcheck shell=bash
# From a directory tree to a disk image, without mounts and without a difference between two builds.

readonly PARTITION_START=1048576 # bytes; the usual alignment

# uuid_for NAME...: a UUID made from the words (RFC 9562 version 8), the same every time.
uuid_for() {
    local hash
    hash=$(printf '%s\n' hearth-image "$@" | sha256sum)
    printf '%s-%s-8%s-a%s-%s\n' "${hash:0:8}" "${hash:8:4}" "${hash:13:3}" "${hash:17:3}" "${hash:20:12}"
}

# write_boot_entry TREE RECIPE: Boot Loader Specification type 1; paths are from the root of the file
# system that holds /boot.
write_boot_entry() {
    local tree=$1 recipe=$2
    mkdir -p "$tree/boot/loader/entries"
    cat >"$tree/boot/loader/entries/$recipe-$KERNEL_VERSION.conf" <<ENTRY
title      $DESCRIPTION
version    $KERNEL_VERSION
sort-key   $recipe
linux      /boot/vmlinuz-$KERNEL_VERSION
initrd     /boot/initrd.img-$KERNEL_VERSION
options    root=UUID=$(uuid_for "$recipe" filesystem) $CMDLINE
ENTRY
}

# make_disk OUT TREE RECIPE MIB EPOCH
make_disk() {
    local out=$1 tree=$2 recipe=$3 mib=$4 epoch=$5 filesystem
    filesystem=$(uuid_for "$recipe" filesystem)
    rm -f "$out"
    truncate -s "${mib}M" "$out"
    sfdisk --quiet --no-reread --no-tell-kernel "$out" <<TABLE
label: gpt
label-id: $(uuid_for "$recipe" disk)
unit: sectors
first-lba: 2048
start=2048, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=$(uuid_for "$recipe" partition), name=root
TABLE
    # No file is newer than the epoch, so that the tree does not tell when it was unpacked.
    find "$tree" -newermt "@$epoch" -print0 | xargs -0r touch -h -d "@$epoch"
    find "$tree" -depth -type d -print0 | xargs -0r touch -d "@$epoch"
    # One MiB is left behind the partition for the GPT's second copy. Features that older boot loaders and
    # rescue systems do not know are left out.
    E2FSPROGS_FAKE_TIME=$epoch mke2fs -q -F -t ext4 -b 4096 -m 1 -L root -U "$filesystem" \
        -O '^orphan_file,^metadata_csum_seed' -d "$tree" \
        -E "offset=$PARTITION_START,hash_seed=$filesystem,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0" \
        "$out" "$((mib * 1024 - 2048))k" 2>&1 | { grep -vi 'contains a gpt partition table' || true; } >&2
    # mke2fs copies the change times of the tree's files, which nobody can set, and access times, which
    # reading has changed; and the owner, if not root.
    find "$tree" -mindepth 1 -printf '/%P\n' | LC_ALL=C sort | while IFS= read -r path; do
        path=${path//\"/\"\"}
        printf 'set_inode_field "%s" %s\n' "$path" "ctime @$epoch" "$path" "ctime_extra 0" \
            "$path" "atime @$epoch" "$path" "atime_extra 0"
        ((EUID == 0)) || printf 'set_inode_field "%s" %s 0\n' "$path" uid "$path" gid
    done >"$out.debugfs"
    E2FSPROGS_FAKE_TIME=$epoch debugfs -w -f "$out.debugfs" "$out?offset=$PARTITION_START" >"$out.log" 2>&1
    if grep -v -e '^debugfs: *set_inode_field ' -e '^debugfs 1' "$out.log" | grep . >&2; then
        die "debugfs could not set the files' times"
    fi
    rm -f "$out.debugfs" "$out.log"
}

check_disk() {
    sfdisk --quiet --verify "$1" >/dev/null || die "the partition table is damaged"
    e2fsck -fn "$1?offset=$PARTITION_START" >"$1.log" 2>&1 || {
        cat "$1.log" >&2
        die "the file system is damaged"
    }
    rm -f "$1.log"
}

# describe_disk DISK RECIPE EPOCH: JSON for `hearth image import`.
describe_disk() {
    local hash
    hash=$(sha256sum <"$1")
    cat <<JSON
{
  "name": "$2-$(date -u -d "@$3" +%Y%m%d)",
  "description": "$DESCRIPTION",
  "recipe": "$2",
  "architecture": "x86_64",
  "root_device_name": "/dev/vda",
  "root_partition": 1,
  "kernel_version": "$KERNEL_VERSION",
  "default_user": "$DEFAULT_USER",
  "format": "raw",
  "size_bytes": $(stat -c %s "$1"),
  "sha256": "${hash%% *}",
  "source_date_epoch": $3
}
JSON
}

# pack_initrd TREE OUT COMPRESSOR...: a cpio archive that depends on names and contents alone.
pack_initrd() {
    local tree=$1 out=$2
    shift 2
    find "$tree" -exec touch -h -d @0 {} +
    (cd "$tree" && find . -print0 | LC_ALL=C sort -z |
        cpio -0 -o -H newc -R 0:0 --reproducible --quiet) | "$@" >"$out"
}

# kernel_files DIR: unpacks the newest stock cloud kernel's package into DIR: the installed one if there
# is one, else it is downloaded.
kernel_files() {
    local dir=$1 version package
    if version=$(newest_kernel); then
        mkdir -p "$dir/boot" "$dir/lib/modules"
        cp -a "/boot/vmlinuz-$version" "$dir/boot/"
        ln -s "/lib/modules/$version" "$dir/lib/modules/$version"
        return
    fi
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: *\(linux-image-[0-9].*-cloud-amd64\)$/\1/p' | tail -n 1)
    [[ -n $package ]] || die "apt knows no linux-image-cloud-amd64: run apt-get update"
    mkdir -p "$dir"
    (cd "$dir" && apt-get download -q "$package" >&2 && dpkg-deb -x ./*.deb . && rm -f ./*.deb)
}
