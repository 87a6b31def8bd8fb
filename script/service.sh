# shellcheck shell=bash
# The two binaries of this repository, for the scripts that run them: build, sandbox, worker.

# Where cargo puts them; the debug profile builds in a fraction of the release build's time.
readonly BINARIES=${CARGO_TARGET_DIR:-$ROOT/target}/debug
readonly SANDBOX_KEY=sandbox-key

build_binaries() {
    require_rust
    say "building call-manager and the sandbox (minutes the first time, seconds later)"
    run cargo build --manifest-path "$ROOT/Cargo.toml" --workspace --bins --locked
}

# start_sandbox <log>: the stand-in for ElevenLabs; exports where it is and its key.
start_sandbox() {
    local port
    free_port
    port=$REPLY
    start 5 "$BINARIES/elevenlabs-sandbox" --listen "127.0.0.1:$port" --api-key "$SANDBOX_KEY" >"$1" 2>&1
    wait_until 30 "$!" "$1" "the sandbox" answers_200 "$port" /sandbox/health
    export ELEVENLABS_BASE_URL=http://127.0.0.1:$port ELEVENLABS_API_KEY=$SANDBOX_KEY
    say "sandbox: $ELEVENLABS_BASE_URL stands in for ElevenLabs; nobody is called"
}

# start_worker <log>: on the exported PORT; with "-" as the log it writes to the terminal. Its pid is in $WORKER.
start_worker() {
    # shellcheck disable=SC2153 # set by the scripts
    local port=$PORT
    # The worker's own grace period is 30 s.
    if [[ $1 == - ]]; then
        start 60 "$BINARIES/call-manager" worker
    else
        start 60 "$BINARIES/call-manager" worker >"$1" 2>&1
    fi
    WORKER=$!
    wait_until 60 "$WORKER" "${1/#-//dev/null}" "the worker" answers_200 "$port" /health/ready
}
