# shellcheck shell=bash
# Sourced by the other scripts: shared settings and timed steps.
: "${ICTX_CACHE:=$HOME/.cache/ictx}"
: "${ICTX_LAB_STATE:=$HOME/.local/state/ictx/lab}"
export ICTX_CACHE ICTX_LAB_STATE PATH="$PWD/.venv/bin:$PATH" ANSIBLE_FORCE_COLOR="${ANSIBLE_FORCE_COLOR:-$([ -t 1 ] && echo 1 || echo 0)}"

_steps=()

fail() {
  echo "error: $*" >&2
  exit 1
}

# Prints the comment at the top of the script as its help.
usage() { sed -n '2,${/^#/!q;/^# shellcheck/d;s/^# \{0,1\}//;p}' "scripts/${0##*/}"; }

# --help must not have side effects, so it is handled before anything else.
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  usage
  exit
fi

# no_arguments "$@": fails on any argument, for scripts without arguments.
no_arguments() { [ $# = 0 ] || fail "unknown argument $1: see scripts/${0##*/} --help"; }

# step TITLE COMMAND…: runs the command and records its duration; exits if it fails.
step() {
  local title=$1 start=$SECONDS
  shift
  printf '\n=== %s\n' "$title"
  "$@" || fail "step failed after $((SECONDS - start)) s: $title"
  _steps+=("$(printf '%5d s  %s' $((SECONDS - start)) "$title")")
}

# watched TITLE COMMAND…: like step, but shows a progress line and logs the output to a file (ICTX_VERBOSE=1 also prints it).
# On failure, prints host, task, cause and the log's path.
watched() {
  local title=$1 start=$SECONDS
  shift
  : "${ICTX_LOG:=${ICTX_LAB_STATE%/*}/logs/${0##*/}-$(date +%Y%m%d-%H%M%S).log}"
  if [ ! -t 1 ]; then printf '\n=== %s\n' "$title"; fi
  "$@" 2>&1 | scripts/progress --log "$ICTX_LOG" "$title" || {
    scripts/progress --log "$ICTX_LOG" --why "$title" >&2
    fail "step failed after $((SECONDS - start)) s: $title"
  }
  _steps+=("$(printf '%5d s  %s' $((SECONDS - start)) "$title")")
}

# skip TITLE REASON: reports that a step is skipped.
skip() {
  printf '\n=== %s: skipped (%s)\n' "$1" "$2"
  _steps+=("$(printf '      -  %s: %s' "$1" "$2")")
}

print_steps() {
  printf '%s\n' "${_steps[@]}"
  printf '%5d s  in all\n' "$SECONDS"
}
