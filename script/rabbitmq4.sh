# shellcheck shell=bash
# RabbitMQ 4 beside the packaged one: from a later release of Debian, in a folder of its own that is built once.

# The release that has RabbitMQ 4, and the folder with its root directory.
readonly RABBITMQ_4_RELEASE=trixie
readonly RABBITMQ_4=$ROOT/target/rabbitmq-4

# Sees to the folder, and sets what it takes to run something there.
ensure_rabbitmq_4() {
    # shellcheck disable=SC2034 # read by broker.sh
    RABBITMQ_ROOT=$RABBITMQ_4
    # In a mount namespace of its own, so that nothing is left mounted, however the process ends. Only root may have one
    # without a user namespace, and a change of user makes the kernel forget --pdeathsig.
    INSIDE=(unshare --mount bash -c "$ENTER" enter "$RABBITMQ_4" "$STATE")
    if ((EUID != 0)); then
        INSIDE=(unshare --mount --map-root-user setpriv --pdeathsig KILL "${INSIDE[@]:2}")
    fi
    if ! find_rabbitmq; then build_rabbitmq_4; fi
    # Where a node's directory is mounted, under its own name.
    if [[ ! -d $RABBITMQ_4$STATE && $STATE != /tmp/* ]]; then
        become_root || die "$RABBITMQ_4$STATE is missing, and only root may make it: run this as root once"
        "${AS_ROOT[@]}" mkdir -p -- "$RABBITMQ_4$STATE"
    fi
}

# Becomes "$3…" in the root directory $1, with the machine's /proc, /dev and /tmp and the scripts' directory $2.
# shellcheck disable=SC2016 # expanded by the inner shell
readonly ENTER='
    set -e
    root=$1 state=$2
    shift 2
    for shared in /tmp /proc /dev; do mount --rbind "$shared" "$root$shared"; done
    if [[ $state != /tmp/* ]]; then mount --rbind "$state" "$root$state"; fi
    cd /
    exec chroot "$root" "$@"
'

# The folder gets its name when it is complete, so that an interrupted build is not taken for a good one.
build_rabbitmq_4() {
    local mirror part=$RABBITMQ_4.part
    mkdir -p -- "$ROOT/target"
    lock rabbitmq-4
    if find_rabbitmq; then
        unlock
        return
    fi
    become_root || die "RabbitMQ 4 is installed into ${RABBITMQ_4#"$ROOT"/} once, which takes root or a sudo without a" \
        "password, and there is neither. Run script/test --rabbitmq 4 as root, or without --rabbitmq"
    command -v debootstrap >/dev/null || install_packages "debootstrap is not installed" debootstrap
    mirror=$(debian_mirror)
    say "building ${RABBITMQ_4#"$ROOT"/}: Debian $RABBITMQ_4_RELEASE from $mirror, some minutes"

    local log=$STATE/rabbitmq-4.log
    run "${AS_ROOT[@]}" rm -rf -- "$part"
    run "${AS_ROOT[@]}" debootstrap --variant=minbase "$RABBITMQ_4_RELEASE" "$part" "$mirror" >"$log" 2>&1 ||
        rabbitmq_4_failed "$log" "debootstrap could not install Debian $RABBITMQ_4_RELEASE from $mirror"
    say "building ${RABBITMQ_4#"$ROOT"/}: the package rabbitmq-server"
    # shellcheck disable=SC2016 # expanded by the inner shell
    run "${AS_ROOT[@]}" unshare --mount bash -c "$ENTER" enter "$part" /tmp/ bash -c '
        set -e
        export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
        # No service is started here, neither now nor later.
        printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        grep -qw localhost /etc/hosts 2>/dev/null || echo "127.0.0.1 localhost" >>/etc/hosts
        apt-get -q -y update
        apt-get -q -y install --no-install-recommends rabbitmq-server
        apt-get clean
    ' >>"$log" 2>&1 || rabbitmq_4_failed "$log" "rabbitmq-server could not be installed in $part"
    "${AS_ROOT[@]}" mv -T -- "$part" "$RABBITMQ_4"
    unlock
}

rabbitmq_4_failed() {
    tail -n 20 -- "$1" >&2
    die "$2; the lines above are the end of ${1#"$ROOT"/}"
}

# The archive that this machine's own packages come from.
debian_mirror() {
    local mirror
    # shellcheck disable=SC2016 # fields of apt
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk '$1 == "Debian" && $2 !~ /-/ { print $3; exit }')
    [[ -n $mirror ]] || die "RabbitMQ 4 comes from a mirror of Debian, and none is in /etc/apt/sources.list or" \
        "/etc/apt/sources.list.d (if one is: run apt-get update)"
    printf '%s\n' "$mirror"
}
