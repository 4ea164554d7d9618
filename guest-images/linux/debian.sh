# shellcheck shell=bash
# Functions for the build scripts, which source this file: install Debian packages, or unpack their .deb files.

say() { echo "guest-images: $*" >&2; }
die() { say "$@" && exit 1; }

# need WHAT=PACKAGE...: installs the package of each WHAT, a command or an absolute path, that is missing.
need() {
    local missing=() pair
    for pair; do
        command -v "${pair%=*}" >/dev/null || [ -e "${pair%=*}" ] || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "Debian packages are missing; run as root: apt-get install ${missing[*]}"
    say "installing ${missing[*]} (about half a minute)"
    refresh
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >"$VMFT_CACHE/apt.log" 2>&1 </dev/null || die "apt-get install failed; see $VMFT_CACHE/apt.log"
}

# Updates the package lists, once in a run: the mirrors may no longer have the .deb files of older lists.
refresh() {
    [ "$(id -u)" = 0 ] && [ -z "${refreshed-}" ] || return 0
    refreshed=1
    apt-get update -qq >&2 || die "apt-get update failed; see above"
}

# versions PACKAGE...: prints "package=version" for each package, as apt would install it now.
versions() {
    local found
    found=$(apt-cache policy "$@" | awk '/^[^ ]/ { name = $1; sub(/:$/, "", name) }
        $1 == "Candidate:" && $2 != "(none)" { print name "=" $2 }')
    [ "$(wc -l <<<"$found")" = $# ] && echo "$found"
}

# unpack DIR PACKAGE=VERSION...: downloads the .deb files and unpacks them all into DIR.
unpack() {
    local dir=$1 debs
    shift
    debs=$(mktemp -d "$dir.debs.XXXX")
    (cd "$debs" && apt-get download -qq -o APT::Sandbox::User=root "$@" >&2) ||
        die "cannot download $*: try again after apt-get update"
    mkdir -p "$dir"
    for deb in "$debs"/*.deb; do
        dpkg-deb -x "$deb" "$dir"
    done
    rm -r "$debs"
}

# key TEXT...: a short hash of the texts, the name under which a result is kept.
key() { printf '%s\n' "$@" | sha256sum | cut -c1-16; }
