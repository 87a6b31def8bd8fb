# shellcheck shell=bash
# A RabbitMQ for the scripts: the one that answers at AMQP_URL, else a private node that lives as long as the script.

readonly DEFAULT_AMQP_URL=amqp://guest:guest@127.0.0.1:5672/%2f

# "yes" when the broker is a private node of this script.
BROKER_IS_PRIVATE=no

# Sees to a broker and exports its AMQP_URL.
ensure_broker() {
    local url=${AMQP_URL:-$DEFAULT_AMQP_URL} host port=5672
    if [[ -n ${CALL_MANAGER_RABBITMQ:-} ]]; then
        say "broker: RabbitMQ $CALL_MANAGER_RABBITMQ is asked for, so this run gets a private one"
        start_private_broker
        return
    fi
    if [[ $url == amqps://* ]]; then port=5671; fi
    read -r host port < <(address_of "$url" "$port")
    if [[ $url == amqps://* ]] || speaks_amqp "$host" "$port"; then
        say "broker: $host port $port, already running"
        export AMQP_URL=$url
        return
    fi
    say "broker: none answers at $host port $port, so this run gets a private one"
    start_private_broker
}

# speaks_amqp <host> <port>: an open port proves little; a broker of AMQP 0-9-1 answers the protocol header with a
# method frame (type 1), any other server with something else or nothing.
speaks_amqp() {
    local answer
    # shellcheck disable=SC2016 # expanded by the inner shell
    answer=$(timeout 3 bash -c '
        exec 3<>"/dev/tcp/$1/$2"
        printf "AMQP\0\0\11\1" >&3
        head -c 1 <&3 | od -An -tx1
    ' probe "$1" "$2" 2>/dev/null) || return 1
    [[ $answer == *01* ]]
}

# The server itself, not the wrapper on the PATH, which changes to the system's rabbitmq user and directories.
readonly RABBITMQ_LIB=/usr/lib/rabbitmq/bin

# What a command is put behind to run where the server is installed, and that place: both empty for the packaged one.
INSIDE=()
RABBITMQ_ROOT=

find_rabbitmq() { [[ -x $RABBITMQ_ROOT$RABBITMQ_LIB/rabbitmq-server ]]; }

# Sees to the programs of the server that $CALL_MANAGER_RABBITMQ names: 4, or empty for the packaged one.
ensure_rabbitmq() {
    case ${CALL_MANAGER_RABBITMQ:-} in
    '') ;;
    4)
        ensure_rabbitmq_4
        return
        ;;
    *) die "CALL_MANAGER_RABBITMQ is 4 or empty, not $CALL_MANAGER_RABBITMQ" ;;
    esac
    find_rabbitmq || install_packages "RabbitMQ is not installed" rabbitmq-server
    find_rabbitmq || die "rabbitmq-server was installed, but is not in $RABBITMQ_LIB"
}

start_private_broker() {
    local pid
    prepare_private_broker
    # SIGTERM is a clean stop of the node.
    start 20 "$BROKER_HOME/start-broker" >"$BROKER_HOME/broker.log" 2>&1
    pid=$!
    wait_until 120 "$pid" "$BROKER_HOME/broker.log" "the private broker" speaks_amqp 127.0.0.1 "$BROKER_PORT"

    # shellcheck disable=SC2034 # read by the scripts
    BROKER_IS_PRIVATE=yes
    say "broker: private node at 127.0.0.1 port $BROKER_PORT, in ${BROKER_HOME#"$ROOT"/}"
}

# Prepares a node that shares nothing with any other: directories, cookie, name, ports and port mapper (epmd) are its
# own. The file start-broker in $BROKER_HOME becomes the node, the same one every time; the file rabbitmqctl there
# commands it. Exports its AMQP_URL.
prepare_private_broker() {
    prepare_nodes 1
    readonly BROKER_HOME=${NODE_HOMES[0]} BROKER_PORT=${NODE_PORTS[0]}
    export AMQP_URL=${NODE_URLS[0]}
}

# prepare_nodes <number>: as many such nodes, which share a cookie and a port mapper, so that they may become a cluster.
# Sets $NODE_HOMES, $NODE_PORTS and $NODE_URLS.
prepare_nodes() {
    local epmd_port cookie number
    ensure_rabbitmq
    free_port
    epmd_port=$REPLY
    cookie=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    NODE_HOMES=() NODE_PORTS=() NODE_URLS=()
    for ((number = 0; number < $1; number++)); do prepare_node "$epmd_port" "$cookie"; done
    start 5 "${INSIDE[@]}" epmd -address 127.0.0.1 -port "$epmd_port" >"${NODE_HOMES[0]}/epmd.log" 2>&1
}

# prepare_node <port of epmd> <cookie>
prepare_node() {
    local epmd_port=$1 home amqp_port dist_port
    scratch broker
    home=$REPLY
    free_port
    amqp_port=$REPLY
    free_port
    dist_port=$REPLY

    write_broker_settings "$home" "$amqp_port" "$2"

    local environment=(
        PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 HOME="$home"
        ERL_EPMD_PORT="$epmd_port" ERL_EPMD_ADDRESS=127.0.0.1
        # A short name at localhost: no host name has to resolve.
        RABBITMQ_NODENAME="call-manager-$amqp_port@localhost"
        RABBITMQ_DIST_PORT="$dist_port"
        RABBITMQ_CONFIG_FILE="$home/rabbitmq.conf"
        RABBITMQ_CONFIG_FILES="$home/conf.d"
        RABBITMQ_ADVANCED_CONFIG_FILE="$home/advanced.config"
        RABBITMQ_CONF_ENV_FILE="$home/rabbitmq-env.conf"
        # Of all the plugins that there are, none: to look through them takes a third of the start.
        RABBITMQ_PLUGINS_DIR="$home/plugins"
        RABBITMQ_ENABLED_PLUGINS_FILE="$home/enabled_plugins"
        RABBITMQ_GENERATED_CONFIG_DIR="$home/generated"
        RABBITMQ_MNESIA_BASE="$home/mnesia"
        RABBITMQ_LOG_BASE="$home/log"
        RABBITMQ_LOGS=-
        RABBITMQ_PID_FILE="$home/node.pid"
        # Two schedulers: enough for tests, and a machine with many cores does not pay for one each.
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='+S 2:2 -kernel inet_dist_use_interface {127,0,0,1}'
        # The start script then becomes the node, so that its pid is the node's; -noinput keeps the shell away.
        RABBITMQ_ALLOW_INPUT=1
        RABBITMQ_CTL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
    )
    local inside=("${INSIDE[@]}" env -i "${environment[@]}")
    write_command "$home/start-broker" "${inside[@]}" "$RABBITMQ_LIB/rabbitmq-server" -noinput
    write_command "$home/rabbitmqctl" "${inside[@]}" "$RABBITMQ_LIB/rabbitmqctl"
    NODE_HOMES+=("$home")
    NODE_PORTS+=("$amqp_port")
    NODE_URLS+=("amqp://guest:guest@127.0.0.1:$amqp_port/%2f")
}

# write_command <file> <command…>: an executable file that becomes the command, with the words it is called with added.
write_command() {
    local file=$1
    shift
    # shellcheck disable=SC2016 # expanded by the file
    { printf '#!/usr/bin/env bash\nexec' && printf ' %q' "$@" && printf ' "$@"\n'; } >"$file"
    chmod 755 -- "$file"
}

# write_broker_settings <home> <amqp port> <cookie>
write_broker_settings() {
    local home=$1
    mkdir -p -- "$home"/{conf.d,generated,mnesia,log,plugins}
    local schemas=("$RABBITMQ_ROOT"/usr/lib/rabbitmq/lib/rabbitmq_server-*/plugins/rabbit-[0-9]*)
    ln -s -- "${schemas[0]#"$RABBITMQ_ROOT"}" "$home/plugins/"
    : >"$home/rabbitmq-env.conf"
    echo '[].' >"$home/enabled_plugins"
    (umask 077 && printf '%s' "$3" >"$home/.erlang.cookie")
    cat >"$home/rabbitmq.conf" <<CONF
listeners.tcp.local = 127.0.0.1:$2
# Small enough for a test to pass it, and larger than any body the tests publish.
max_message_size = 50000000
# A machine with a small disk must not block the publishers of a run that needs a few megabytes.
disk_free_limit.absolute = 50MB
# The log of the quorum queues begins anew when it is this long (the default, named because it matters). RabbitMQ 3.10 can
# lose all of its quorum queues where one is deleted just then, and the tests delete hundreds: so, never within a run.
raft.wal_max_size_bytes = 512000000
log.console.level = info
CONF
}
