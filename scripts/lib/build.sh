# shellcheck shell=bash
# What building and testing need on a bare Debian machine. Source it after common.sh, with $repo set.

# shellcheck disable=SC2034  # used by the scripts that source this
BUILD_PACKAGES=(build-essential pkg-config)
# shellcheck disable=SC2034
TEST_PACKAGES=(
    "${BUILD_PACKAGES[@]}"
    qemu-utils qemu-system-x86 linux-image-cloud-amd64 busybox-static cpio
    openssh-server openssh-client e2fsprogs iproute2 nftables gdisk fdisk zstd xz-utils python3 curl
)

# ensure_rust: the toolchain and cargo-nextest, or a message that says how to get them.
ensure_rust() {
    [[ -d $HOME/.cargo/bin ]] && PATH=$HOME/.cargo/bin:$PATH
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
    command -v cargo >/dev/null || die "Rust $wanted or newer is needed and cargo is not on the PATH: install it with rustup"
    have=$(rustc --version | cut -d ' ' -f 2)
    [[ $(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1) == "$wanted" ]] ||
        die "Rust $wanted or newer is needed, this is $have: run 'rustup update stable'"
}

ensure_nextest() {
    cargo nextest --version >/dev/null 2>&1 && return
    say "installing cargo-nextest (once)"
    cargo install --locked cargo-nextest
}

# ensure_image RECIPE: prints the path of the built image; builds it when the recipe or its inputs are newer.
ensure_image() {
    local image=$repo/images/out/$1.raw
    if [[ ! -e $image || -n $(find "$repo/images" "$scripts/lib/common.sh" -newer "$image" -type f -not -path "$repo/images/out/*" -print -quit) ]]; then
        "$repo/images/build" "$1" "$image" >&2
    fi
    printf '%s\n' "$image"
}
