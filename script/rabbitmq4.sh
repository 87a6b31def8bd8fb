# shellcheck shell=bash
# RabbitMQ 4.3 and PostgreSQL 18 beside the packaged ones: from a later release of Debian, in a folder of its own that
# is built once.

# The release that has RabbitMQ 4.3, and the folder with its root directory. The folder is named after the version, so
# that one with another version is never taken for it.
readonly RABBITMQ_4_RELEASE=forky
readonly RABBITMQ_4=$ROOT/target/rabbitmq-4.3

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
    lock rabbitmq-4.3
    if find_rabbitmq; then
        unlock
        return
    fi
    become_root || die "RabbitMQ 4.3 is installed into ${RABBITMQ_4#"$ROOT"/} once, which takes root or a sudo without" \
        "a password, and there is neither. Run script/test --rabbitmq 4 as root, or without --rabbitmq"
    command -v debootstrap >/dev/null || install_packages "debootstrap is not installed" debootstrap
    mirror=$(debian_mirror)
    say "building ${RABBITMQ_4#"$ROOT"/}: Debian $RABBITMQ_4_RELEASE from $mirror, some minutes"

    local log=$STATE/rabbitmq-4.3.log
    # A debootstrap that is older than the release does not know its name. All of them are built as sid is.
    local recipe=()
    local recipes=/usr/share/debootstrap/scripts
    if [[ ! -e $recipes/$RABBITMQ_4_RELEASE ]]; then recipe=("$recipes/sid"); fi
    run "${AS_ROOT[@]}" rm -rf -- "$part"
    run "${AS_ROOT[@]}" debootstrap --variant=minbase "$RABBITMQ_4_RELEASE" "$part" "$mirror" "${recipe[@]}" \
        >"$log" 2>&1 ||
        rabbitmq_4_failed "$log" "debootstrap could not install Debian $RABBITMQ_4_RELEASE from $mirror"
    say "building ${RABBITMQ_4#"$ROOT"/}: the packages rabbitmq-server and postgresql"
    # shellcheck disable=SC2016 # expanded by the inner shell
    run "${AS_ROOT[@]}" unshare --mount bash -c "$ENTER" enter "$part" /tmp/ bash -c '
        set -e
        export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
        # No service is started here, neither now nor later.
        printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        grep -qw localhost /etc/hosts 2>/dev/null || echo "127.0.0.1 localhost" >>/etc/hosts
        # Nor a cluster of PostgreSQL: each run makes a server of its own.
        mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
        # The index of a release in the making expires after a week, and a mirror may be behind. debootstrap took the
        # same index whatever its date. Signatures are still checked. Only tests on this machine reach these servers.
        apt-get -q -y -o Acquire::Check-Valid-Until=false update
        # The file above is kept, instead of a question about it.
        apt-get -q -y -o Dpkg::Options::=--force-confold install --no-install-recommends \
            rabbitmq-server postgresql
        apt-get clean
    ' >>"$log" 2>&1 || rabbitmq_4_failed "$log" "rabbitmq-server and postgresql could not be installed in $part"
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
    [[ -n $mirror ]] || die "RabbitMQ 4.3 comes from a mirror of Debian, and none is in /etc/apt/sources.list or" \
        "/etc/apt/sources.list.d (if one is: run apt-get update)"
    printf '%s\n' "$mirror"
}
