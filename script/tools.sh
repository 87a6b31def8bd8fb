# shellcheck shell=bash
# The toolchains the scripts need beside the broker: Rust, and for the tests Python and Node.

require_rust() {
    if ! command -v cargo >/dev/null && [[ -x $HOME/.cargo/bin/cargo ]]; then PATH=$HOME/.cargo/bin:$PATH; fi
    command -v cargo >/dev/null ||
        die "cargo is missing. Install Rust: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    # The linker, and the TLS library's C part.
    command -v cc >/dev/null || install_packages "a C compiler is missing" gcc libc6-dev
}

# The interpreter in target/python with what the tests ask for.
ensure_python() {
    local file files=()
    for file in "$ROOT"/{sandbox/,}tests/requirements.txt; do
        if [[ -f $file ]]; then files+=("$file"); fi
    done
    if ((${#files[@]})); then python_environment "$ROOT/target/python" "${files[@]}"; fi
}

# python_environment <directory> <requirements file…>: a virtual environment, made anew only when the files changed.
python_environment() {
    local directory=$1 stamp
    shift
    stamp=$(cat -- "$@" | sha256sum)
    lock "python-${directory##*/}"
    if [[ ! -f $directory/stamp || $(<"$directory/stamp") != "$stamp" ]] || ! "$directory/bin/python" -c ''; then
        find_python || install_packages "Python cannot make virtual environments" python3 python3-venv
        find_python || die "python3-venv was installed, but python3 -m venv still does not work"
        say "installing Python packages into ${directory#"$ROOT"/}"
        run "$REPLY" -m venv --clear "$directory"
        run "$directory/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off \
            "${@/#/--requirement=}" >&2
        echo "$stamp" >"$directory/stamp"
    fi
    unlock
}

# In $REPLY: a Python that can make virtual environments. The distribution's is asked too, in case another shadows it.
find_python() {
    for REPLY in python3 /usr/bin/python3; do
        if "$REPLY" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
    done
    return 1
}

# The packages of tests/node, installed only when the lock file changed.
ensure_node() {
    local project=$ROOT/tests/node stamp
    if [[ ! -f $project/package-lock.json ]]; then return; fi
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        install_packages "Node is not installed" nodejs npm
    fi
    stamp=$(cat -- "$project"/package{,-lock}.json | sha256sum)
    lock node
    if [[ ! -f $project/node_modules/.stamp || $(<"$project/node_modules/.stamp") != "$stamp" ]]; then
        say "installing Node packages into tests/node"
        # A download that hangs is begun again.
        run timeout 120 npm --prefix "$project" ci --no-audit --no-fund >&2 ||
            run timeout 300 npm --prefix "$project" ci --no-audit --no-fund >&2 ||
            die "npm could not install what tests/node/package-lock.json names; is the registry reachable?"
        echo "$stamp" >"$project/node_modules/.stamp"
    fi
    unlock
}

# ensure_cargo_tool <name> <version>: the cargo subcommand of the PATH, else the given version, built into target/tools.
ensure_cargo_tool() {
    PATH=$ROOT/target/tools/bin:$PATH
    if command -v "cargo-$1" >/dev/null; then return; fi
    say "cargo $1 is not installed: building it into target/tools, some minutes"
    lock "cargo-$1"
    run cargo install --locked --root "$ROOT/target/tools" "cargo-$1@$2"
    unlock
}

# ensure_command <command> <package>
ensure_command() { command -v "$1" >/dev/null || install_packages "$1 is not installed" "$2"; }
