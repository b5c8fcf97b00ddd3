# shellcheck shell=bash
# What building and testing need on a bare Debian machine. Source it after common.sh, with $repo set.

# shellcheck disable=SC2034  # used by the scripts that source this
BUILD_PACKAGES=(build-essential pkg-config)
# shellcheck disable=SC2034
TEST_PACKAGES=(
    "${BUILD_PACKAGES[@]}"
    qemu-utils qemu-system-x86 linux-image-cloud-amd64 busybox-static cpio
    nbdkit fio qemu-system-common openssh-server openssh-client e2fsprogs iproute2 nftables gdisk fdisk zstd xz-utils python3 curl
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

# build_programs PROFILE: hearth, hearthd and hearth-vmm in target/programs/PROFILE.
build_programs() {
    cargo build --profile "$1" --locked "${@:2}" --workspace --bins --exclude hearth-vmm
    place_programs "$@"
}

# build_tests: all tests, and with them what build_programs dev does. On their own, cargo would build the programs with fewer features of
# the libraries, and so most of the libraries twice.
build_tests() {
    cargo nextest run --workspace --locked --no-run
    place_programs dev
}

# place_programs PROFILE: the programs that cargo has built, and hearth-vmm. That is linked statically, so that the root it runs in
# can be empty; it has a target folder of its own, because cargo would link it anew otherwise whenever it is built the one way after
# the other.
place_programs() {
    local out=$repo/target/programs/$1 built=$1 program
    [[ $1 != dev ]] || built=debug
    cargo rustc --profile "$1" --locked "${@:2}" -p hearth-vmm --bin hearth-vmm --target-dir "$repo/target/static" -- -C target-feature=+crt-static
    mkdir -p "$out"
    for program in "$repo/target/$built/hearth" "$repo/target/$built/hearthd" "$repo/target/static/$built/hearth-vmm"; do
        # A new file in the old one's place: the old one may be running.
        cmp -s "$program" "$out/${program##*/}" || { cp "$program" "$out/.new" && mv "$out/.new" "$out/${program##*/}"; }
    done
}

# ensure_image RECIPE: prints the path of the built image; builds it when the recipe or its inputs are newer.
ensure_image() {
    local image=$repo/images/out/$1.raw
    if [[ ! -e $image || -n $(find "$repo/images" "$scripts/lib/common.sh" -newer "$image" -type f -not -path "$repo/images/out/*" -print -quit) ]]; then
        "$repo/images/build" "$1" "$image" >&2
    fi
    printf '%s\n' "$image"
}
