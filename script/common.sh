# shellcheck shell=bash
# What the scripts share: progress lines, processes that end with the script, ports, locks and packages.
#
# Everything a script writes lies under target/, or in /tmp where a server's user cannot reach that, and everything it
# starts is stopped when it ends, also after Ctrl-C or a kill. Two scripts may run next to each other in one checkout.

set -euo pipefail

# Root's programs (chroot, debootstrap) are not on every PATH.
PATH=$PATH:/usr/sbin:/sbin

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly STATE=$ROOT/target/script

# shellcheck source=script/broker.sh
source "$ROOT/script/broker.sh"
# shellcheck source=script/rabbitmq4.sh
source "$ROOT/script/rabbitmq4.sh"
# shellcheck source=script/postgres.sh
source "$ROOT/script/postgres.sh"
# shellcheck source=script/service.sh
source "$ROOT/script/service.sh"
# shellcheck source=script/tools.sh
source "$ROOT/script/tools.sh"

# ---- what a person reads ---------------------------------------------------------------------------------------

say() { printf '%3ds  %s\n' "$SECONDS" "$*" >&2; }

die() {
    printf '\nerror: %s\n' "$*" >&2
    exit 1
}

# ---- processes ---------------------------------------------------------------------------------------------------

# What has to be stopped, oldest first: "<signal target> <pid> <seconds it may take to stop> [<signal>]".
STARTED=()
# Directories that go away with the script.
SCRATCH=()

# Runs a command in a session of its own, so that Ctrl-C reaches this script alone and `stop_all` decides the order.
# A background command of a shell ignores SIGINT, hence the reset; the kernel sends it SIGTERM if this script is killed.
spawn() { setsid env --default-signal=INT,QUIT setpriv --pdeathsig TERM "$@" </dev/null & }

# start <seconds it may take to stop> <command…>: runs in the background until the script ends; its pid is in $!.
start() {
    local grace=$1
    shift
    spawn "$@"
    STARTED+=("$! $! $grace")
}

# stops_with <signal>: what `start` has just started is stopped with this signal instead of SIGTERM.
stops_with() { STARTED[-1]+=" $1"; }

# run <command…>: like a plain call, but a signal to this script stops the command with all its children at once.
run() {
    local status=0
    spawn "$@"
    STARTED+=("-$! $! 15")
    wait "$!" || status=$?
    unset 'STARTED[-1]'
    return "$status"
}

stop() {
    local target=$1 pid=$2 deadline=$((SECONDS + $3))
    kill "-${4:-TERM}" -- "$target" 2>/dev/null || true
    while kill -0 -- "-$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.05; done
    kill -KILL -- "-$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

stop_all() {
    trap '' INT TERM HUP
    while ((${#STARTED[@]})); do
        # shellcheck disable=SC2086 # three words, or four
        stop ${STARTED[-1]}
        unset 'STARTED[-1]'
    done
    if ((${#SCRATCH[@]})); then rm -rf -- "${SCRATCH[@]}"; fi
}

trap stop_all EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# wait_until <seconds> <pid> <log> <what> <command…>: until the command succeeds; fails with the log's end when the
# process dies or the time is over.
wait_until() {
    local limit=$1 pid=$2 log=$3 what=$4 began=$SECONDS told=$SECONDS
    shift 4
    until "$@"; do
        if ! kill -0 "$pid" 2>/dev/null; then
            tail -n 40 -- "$log" >&2
            die "$what ended before it was ready; the lines above are its log"
        elif ((SECONDS - began >= limit)); then
            tail -n 40 -- "$log" >&2
            die "$what was not ready within $limit s; the lines above are its log"
        elif ((SECONDS - told >= 5)); then
            told=$SECONDS
            say "still waiting for $what"
        fi
        sleep 0.1
    done
}

# answers_200 <port> <path>: an HTTP GET without any client installed.
answers_200() {
    # shellcheck disable=SC2016 # expanded by the inner shell
    timeout 3 bash -c '
        exec 3<>"/dev/tcp/127.0.0.1/$1"
        printf "GET %s HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n" "$2" >&3
        head -n 1 <&3
    ' http "$1" "$2" 2>/dev/null | grep -q ' 200 '
}

# ---- directories, locks, ports -------------------------------------------------------------------------------------

# scratch <name>: a directory for this run alone, in $REPLY. Those of runs that were killed are removed on the way.
scratch() {
    local old fd
    mkdir -p -- "$STATE/runs"
    lock runs
    for old in "$STATE"/runs/*/; do
        # Its script, or a process the script started, still holds the lock while it is in use.
        if [[ -f $old/lock ]] && flock --nonblock "$old/lock" true; then remove_run "$old"; fi
    done
    REPLY=$(mktemp -d -- "$STATE/runs/$1.XXXXXX")
    SCRATCH+=("$REPLY")
    exec {fd}>"$REPLY/lock"
    flock "$fd"
    unlock
}

# remove_run <directory>: with the directory outside the checkout that the run may have had, a link named outside.
remove_run() {
    local outside
    if outside=$(readlink -- "$1/outside"); then rm -rf -- "$outside"; fi
    rm -rf -- "$1"
}

# The file descriptors of the locks held, the newest last.
LOCKS=()

# lock <name>: one script at a time, until `unlock`, which gives back the newest lock.
lock() {
    local fd
    mkdir -p -- "$STATE/locks"
    exec {fd}>"$STATE/locks/$1"
    if ! flock --nonblock "$fd"; then
        say "waiting for another run that is busy with: $1"
        run flock "$fd"
    fi
    LOCKS+=("$fd")
}

unlock() {
    local fd=${LOCKS[-1]}
    exec {fd}>&-
    unset 'LOCKS[-1]'
}

# free_port: a free port on the loopback interface, in $REPLY, reserved against the other scripts of this checkout.
# Below the range the kernel takes outgoing ports from, so that no connection sits on it a moment later.
free_port() {
    local fd
    mkdir -p -- "$STATE/locks"
    while true; do
        REPLY=$((20000 + RANDOM % 12000))
        port_is_free "$REPLY" || continue
        exec {fd}>"$STATE/locks/port-$REPLY"
        if flock --nonblock "$fd"; then return; fi
        exec {fd}>&-
    done
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# address_of <url> <port if it names none>: prints host and port.
address_of() {
    local authority=${1#*://} host port=$2
    authority=${authority%%[/?]*}
    authority=${authority##*@}
    host=$authority
    if [[ $authority =~ ^(.*):([0-9]+)$ && $authority != *']' ]]; then
        host=${BASH_REMATCH[1]}
        port=${BASH_REMATCH[2]}
    fi
    host=${host#[}
    host=${host%]}
    printf '%s %s\n' "${host:-127.0.0.1}" "$port"
}

# ---- packages ------------------------------------------------------------------------------------------------------

# become_root: what a command is put behind to run as root, in $AS_ROOT; fails where that is not possible.
become_root() {
    AS_ROOT=()
    if ((EUID == 0)); then return; fi
    run sudo -n true 2>/dev/null || return
    AS_ROOT=(sudo -n)
}

# install_packages <reason> <package…>: from the distribution, or an error that says what to install.
install_packages() {
    local reason=$1 root=()
    shift
    local by_hand="$reason. Install it yourself: apt-get install --no-install-recommends $*"
    command -v apt-get >/dev/null || die "$by_hand (or what your system calls it)"
    become_root || die "$by_hand (as root: there is no sudo without a password here)"
    root=("${AS_ROOT[@]}")

    say "$reason: installing $* with apt-get"
    lock packages
    local apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300)
    local install=("${apt[@]}" install --no-install-recommends "$@")
    # The long part, the download, may be interrupted; dpkg at work may not.
    if ! run "${install[@]}" --download-only >&2; then
        say "the package lists may be missing or old: apt-get update"
        run "${apt[@]}" update >&2 || die "apt-get update failed. $by_hand"
        run "${install[@]}" --download-only >&2 || die "apt-get could not download. $by_hand"
    fi
    without_services "${root[@]}" -- "${install[@]}" >&2 || die "apt-get install failed. $by_hand"
    unlock
}

# without_services [sudo…] -- <command…>: packages installed by the command start no system service: the scripts run
# servers of their own. The policy file is removed by the process that wrote it, whatever becomes of this script.
without_services() {
    local root=()
    while [[ $1 != -- ]]; do
        root+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2016 # expanded by the inner shell
    (
        trap '' INT TERM HUP
        "${root[@]}" bash -c '
            policy=/usr/sbin/policy-rc.d
            if (set -C; printf "#!/bin/sh\nexit 101\n" >$policy) 2>/dev/null; then
                trap "rm -f $policy" EXIT
                chmod 755 $policy
            fi
            "$@"
        ' without_services "$@" </dev/null
    )
}
