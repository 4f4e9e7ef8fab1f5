# For sourcing by tests/run and tools/demo: getting the programs they need onto a Debian or Ubuntu.
# Expects `yes` (1: do not ask) and gives need_packages, need_rust, as_root.

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

# Runs a command as root: at once when this is root, else through sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

# Shows what would be done as root and asks, unless this is root already or --yes was given.
agree() {
  if [ "$(id -u)" = 0 ] || [ "${yes:-0}" = 1 ]; then return 0; fi
  command -v sudo >/dev/null || die "run this as root: $*"
  say "This needs to be done first:" "  sudo $*"
  [ -t 0 ] || die "say --yes to do it without asking, or run it yourself"
  local answer
  read -r -p "Do it now? [y/N] " answer
  [[ $answer = [yY]* ]] || die "stopped"
}

# need_packages PROGRAM=PACKAGE...: installs the packages whose program is missing. A program
# with a slash is a file that has to exist.
need_packages() {
  local pair program missing=()
  for pair in "$@"; do
    program=${pair%%=*}
    case $program in
      */*) [ -e "$program" ] || missing+=("${pair#*=}") ;;
      *) PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("${pair#*=}") ;;
    esac
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "install these first, by what your system calls them: ${missing[*]}"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}")
  agree "apt-get update && apt-get install ${missing[*]}"
  # docker-registry and podman start nothing on their own here: what they run, we start and end.
  as_root apt-get -q update >&2 || say "apt-get update failed; trying with the lists at hand"
  as_root "${install[@]}" >&2 || die "installing ${missing[*]} failed (Ubuntu has some of them in 'universe')"
}

# Is version $1 at least $2?
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

rust_version() { rustc --version 2>/dev/null | cut -d' ' -f2; }

# need_rust DIR: a toolchain as new as DIR/Cargo.toml asks for, with rustfmt and clippy.
need_rust() {
  local wanted have candidate
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$1/Cargo.toml")
  [ ! -d "$HOME/.cargo/bin" ] || PATH=$HOME/.cargo/bin:$PATH
  have=$(rust_version)
  if [ -n "$have" ] && at_least "$have" "$wanted" && cargo fmt --version >/dev/null 2>&1 &&
    cargo clippy --version >/dev/null 2>&1; then
    return 0
  fi
  if ! command -v rustup >/dev/null; then
    candidate=$(apt-cache policy rustc 2>/dev/null | sed -n 's/^ *Candidate: //p')
    if [ -n "$candidate" ] && at_least "${candidate%%[+-]*}" "$wanted"; then
      need_packages rustc-of-the-system=rustc cargo-of-the-system=cargo cargo-fmt=rustfmt cargo-clippy=rust-clippy
      return 0
    fi
    if apt-cache show rustup >/dev/null 2>&1; then
      need_packages rustup=rustup
    else
      die "Rust $wanted or newer is needed, here is ${have:-none}, and the system's packages hold none as new.
  Install rustup as the Rust project describes, then run this again."
    fi
  fi
  # rustup keeps to the user's home: nothing of the system changes, so nothing is asked.
  rustup toolchain install "$wanted" --profile minimal --component rustfmt --component clippy >&2 ||
    die "rustup could not install Rust $wanted"
  export RUSTUP_TOOLCHAIN=$wanted
}
