# Functions of the scripts beside it: what they say, and packages of the system.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Installs system packages if that needs no question; false if it cannot be done.
apt_lists=old
system_install() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null; then
        as_root='sudo -n'
    else
        return 1
    fi
    say "apt-get install $*"
    if [ "$apt_lists" = old ]; then
        # A source that fails need not be the one that has these packages.
        $as_root apt-get -qq update >/dev/null || say "apt-get update failed; going on with the lists there are"
        apt_lists=new
    fi
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}
