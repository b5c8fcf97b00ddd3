# shellcheck shell=bash
# Helpers for the project's shell scripts. Source it; it needs bash and sets nothing but functions.

# Messages go to stderr, so that stdout stays the command's own.
say() { printf '%s: %s\n' "${PROGRAM:-${0##*/}}" "$*" >&2; }

# die MESSAGE...: 125 marks a failure of the tool itself, apart from the exit codes of what it runs.
die() {
    say "$@"
    exit 125
}

# quote WORD...: prints the words quoted for a POSIX shell, separated by blanks.
quote() {
    local word out=
    for word; do
        out+=" '${word//\'/\'\\\'\'}'"
    done
    printf '%s' "${out# }"
}

# ensure_packages PACKAGE...: installs the Debian packages that are missing. Quick when nothing is.
ensure_packages() {
    local package missing=()
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    ((EUID == 0)) || die "these packages are missing and only root can install them: ${missing[*]}"
    say "installing ${missing[*]}"
    local log
    log=$(mktemp)
    if ! { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" ||
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; }; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get could not install: ${missing[*]}"
    fi
    rm -f "$log"
}

# newest_kernel: version of the newest installed Debian cloud kernel that has its modules, or fails.
newest_kernel() {
    local image version best=
    while IFS= read -r image; do
        version=${image#/boot/vmlinuz-}
        [[ -d /lib/modules/$version ]] && best=$version
    done < <(printf '%s\n' /boot/vmlinuz-*-cloud-amd64 | sort -V)
    [[ -n $best ]] && printf '%s\n' "$best"
}

# unpack_module VERSION NAME DIR: puts a kernel module, uncompressed, into DIR as NAME.ko.
# Succeeds without a file when the kernel has it built in.
unpack_module() {
    local version=$1 name=$2 dir=$3 root=${4:-} path
    path=$(find "$root/lib/modules/$version/kernel" -name "$name.ko*" -print -quit)
    case $path in
        *.ko) cp "$path" "$dir/$name.ko" ;;
        *.ko.xz) xz -dc "$path" >"$dir/$name.ko" ;;
        *.ko.zst) zstd -qdc "$path" >"$dir/$name.ko" ;;
        *.ko.gz) gzip -dc "$path" >"$dir/$name.ko" ;;
        *) grep -q "/$name\.ko\$" "$root/lib/modules/$version/modules.builtin" ;;
    esac
}

# wait_until SECONDS COMMAND...: tries the command every tenth of a second.
wait_until() {
    local end=$((SECONDS + $1 + 1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}
