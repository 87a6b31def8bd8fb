# shellcheck shell=bash
# A PostgreSQL for the scripts: the one that answers at POSTGRES_URL, else a private server that lives as long as the
# script.

# Sees to a server and exports its POSTGRES_URL.
ensure_postgres() {
    local host port
    if [[ -z ${POSTGRES_URL:-} ]]; then
        say "postgres: POSTGRES_URL is not set, so this run gets a private server"
    else
        read -r host port < <(address_of "$POSTGRES_URL" 5432)
        if speaks_postgres "$host" "$port"; then
            say "postgres: $host port $port, already running"
            export POSTGRES_URL
            return
        fi
        say "postgres: none answers at $host port $port, so this run gets a private one"
    fi
    choose_postgres
    find_postgres || install_packages "PostgreSQL is not installed" postgresql
    find_postgres || die "postgresql was installed, but its programs are not in $POSTGRES_LIB/<version>/bin"
    start_private_postgres
}

# speaks_postgres <host> <port>: an open port proves little; PostgreSQL answers the question for TLS with one letter.
speaks_postgres() {
    local answer
    # shellcheck disable=SC2016 # expanded by the inner shell
    answer=$(timeout 3 bash -c '
        exec 3<>"/dev/tcp/$1/$2"
        printf "\0\0\0\10\4\322\26\57" >&3
        head -c 1 <&3 | tr -d "\0"
    ' probe "$1" "$2" 2>/dev/null) || return 1
    [[ $answer == [SN] ]]
}

# What a command is put behind to run where the programs are, and that place: both empty for the packaged ones.
POSTGRES_INSIDE=()
POSTGRES_ROOT=

# With RabbitMQ 4.3 goes PostgreSQL 18, from the same folder. Without root a process in there is root in a namespace of
# users, which PostgreSQL refuses, and a chroot allows no further namespace: then the packaged one it is.
choose_postgres() {
    if [[ -z ${CALL_MANAGER_RABBITMQ:-} ]]; then return; fi
    if ((EUID != 0)); then
        say "postgres: the packaged one, as that of ${RABBITMQ_4#"$ROOT"/} takes root"
        return
    fi
    ensure_rabbitmq
    POSTGRES_INSIDE=("${INSIDE[@]}")
    POSTGRES_ROOT=$RABBITMQ_ROOT
}

# The programs of the newest version, in $POSTGRES_BIN. They are not on the PATH, whose wrappers (pg_ctlcluster and
# others) manage the system's own servers.
readonly POSTGRES_LIB=/usr/lib/postgresql
find_postgres() {
    local bin
    while read -r bin; do
        if [[ -x $bin/initdb && -x $bin/postgres && -x $bin/pg_isready ]]; then
            POSTGRES_BIN=${bin#"$POSTGRES_ROOT"}
            return
        fi
    done < <(printf '%s\n' "$POSTGRES_ROOT$POSTGRES_LIB"/*/bin | sort --version-sort --reverse)
    return 1
}

# Starts a server that shares nothing with any other: data, user, database and port are its own, and it has no socket
# but the one on the loopback interface.
start_private_postgres() {
    local home port pid
    choose_postgres_user
    make_postgres_home
    home=$REPLY
    free_port
    port=$REPLY

    make_postgres_data "$home" "$port"
    run_postgres "$home"
    pid=$!
    wait_until 60 "$pid" "$home/postgres.log" "the private PostgreSQL" postgres_is_ready "$port"

    export POSTGRES_URL=postgres://call-manager@127.0.0.1:$port/call-manager
    say "postgres: private server at 127.0.0.1 port $port, in ${home#"$ROOT"/}"
}

# run_postgres <home>: starts the server in the background; its pid is in $!.
run_postgres() {
    # SIGTERM would wait for every client to leave; SIGINT shows them out, and is a clean stop too. It is also what the
    # kernel sends if this script is killed: that setting does not outlive a change of user, hence once more.
    start 20 "${POSTGRES_INSIDE[@]}" setpriv --pdeathsig INT "${POSTGRES_IDS[@]}" "${POSTGRES_ENVIRONMENT[@]}" \
        "$POSTGRES_BIN/postgres" -D "$1/data" >>"$1/postgres.log" 2>&1
    stops_with INT
}

# PostgreSQL refuses to run as root: the package's user runs it then. Sets the id of the server's user, $POSTGRES_OWNER,
# and the options of setpriv that make a command run as that user, $POSTGRES_IDS.
choose_postgres_user() {
    local user=postgres
    POSTGRES_OWNER=$EUID
    POSTGRES_IDS=()
    if ((EUID != 0)); then return; fi
    # Of the users that the programs see: initdb looks up its own name.
    local id=("${POSTGRES_INSIDE[@]}" id)
    "${id[@]}" -u "$user" >/dev/null 2>&1 || user=nobody
    POSTGRES_OWNER=$("${id[@]}" -u "$user")
    POSTGRES_IDS=(--reuid "$POSTGRES_OWNER" --regid "$("${id[@]}" -g "$user")" --clear-groups)
}

# No PGHOST, PGOPTIONS and the like of the person's shell, and a working directory that every user may be in.
readonly POSTGRES_ENVIRONMENT=(env -i --chdir=/ PATH=/usr/local/bin:/usr/bin:/bin LANG=C)

# as_postgres <command…>: as the server's user. No signal to this script reaches the command, which takes a second or
# two: initdb, when it is interrupted, leaves shared memory behind.
as_postgres() {
    setsid --wait "${POSTGRES_INSIDE[@]}" setpriv "${POSTGRES_IDS[@]}" "${POSTGRES_ENVIRONMENT[@]}" "$@"
}

# A directory of this run whose way the server's user may go, in $REPLY.
make_postgres_home() {
    local run
    scratch postgres
    run=$REPLY
    chmod 711 -- "$run"
    if as_postgres test -x "$run"; then return; fi
    # The checkout lies where only its owner may look.
    REPLY=$(mktemp -d /tmp/call-manager-postgres.XXXXXX)
    SCRATCH+=("$REPLY")
    ln -s -- "$REPLY" "$run/outside"
    chmod 711 -- "$REPLY"
}

# make_postgres_data <home> <port>: settings, user and database. Whoever reaches the port is let in as that user, who
# may do everything in its databases and nothing outside of them; nobody is let in as the superuser.
make_postgres_data() {
    local data=$1/data log=$1/initdb.log
    mkdir -m 700 -- "$data"
    if ((EUID == 0)); then chown -- "$POSTGRES_OWNER" "$data"; fi
    if ! as_postgres "$POSTGRES_BIN/initdb" --pgdata="$data" --username=postgres --auth=reject \
        --encoding=UTF8 --locale=C --no-sync >"$log" 2>&1; then
        tail -n 40 -- "$log" >&2
        die "initdb failed; the lines above are its log"
    fi
    write_postgres_settings "$data" "$2"
    # Without a server: each line is a command.
    if ! as_postgres "$POSTGRES_BIN/postgres" --single -D "$data" -c exit_on_error=on postgres >"$log" 2>&1 <<SQL; then
CREATE ROLE "call-manager" LOGIN CREATEDB
CREATE DATABASE "call-manager" OWNER "call-manager"
SQL
        tail -n 40 -- "$log" >&2
        die "the database could not be made; the lines above are PostgreSQL's log"
    fi
}

# write_postgres_settings <data directory> <port>
write_postgres_settings() {
    echo 'host all call-manager 127.0.0.1/32 trust' >"$1/pg_hba.conf"
    cat >>"$1/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $2
unix_socket_directories = ''
# What was committed survives a crash: the defaults, named because the tests are about just that.
fsync = on
synchronous_commit = on
# Tests and workers with a pool each, all at once.
max_connections = 300
# A machine with little memory or a small disk is enough.
shared_buffers = 32MB
max_wal_size = 256MB
# Files of the data directory, which goes away with the run, instead of /dev/shm.
dynamic_shared_memory_type = mmap
CONF
}

# postgres_is_ready <port>: lets clients in, which is later than the port's opening.
postgres_is_ready() {
    as_postgres "$POSTGRES_BIN/pg_isready" --quiet --timeout=3 --host=127.0.0.1 --port="$1" \
        --username=call-manager --dbname=call-manager
}
