#!/usr/bin/env bash
# Trains on this host: starts the processes, keeps their output, ends all when one fails, and starts them again.
#
#     launch/host.sh -- --config=configs/digits_rcm.py --workdir=runs/digits_rcm --config.seed=1
#
# The words after "--" go to every `python -m launch.train` as they are. Before it:
#   --processes=N  processes on this host, one a GPU; by default one for the whole host
#   --starts=N     how often to start before giving up (20)
#   --logs=DIR     process I of this host appends its output to DIR/HOST.I.log (logs)
#   --dry-run      print the commands only
# SIGTERM and Ctrl-C end the run after a checkpoint.
#
# Exit codes, of which the highest of several hosts counts: 0 done; 1 ended early, the same command continues;
# 2 a mistake to mend; 3 the numbers or the data are wrong. Needs bash 5.1; $PYTHON takes the place of .venv/bin/python.

set -uo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "$0")/options.sh"

GRACE=60 # seconds that the others have to end by themselves when one process has failed
processes=1 starts=20 logs=logs dry_run=''
read_options "processes starts logs dry-run" "$@"
[ ${#others[@]} = 0 ] || fail "unknown option ${others[0]}: see --help"
require_integers 1 processes starts
((processes == 1)) || train+=(--distributed)

declare -A running=() # by process id
writers=() timer='' asked=''
trap 'asked=yes; kill -TERM "${!running[@]}" 2>/dev/null' TERM INT

# Starts the command $2... in the background, its output going to the file $1 and, while somebody listens, to stdout.
start() {
    local output log=$1
    shift
    exec {output}> >(trap '' TERM INT && exec tee -ap "$log")
    writers+=($!)
    "$@" >&"$output" 2>&1 &
    running[$!]=yes
    exec {output}>&-
}

# Starts every process once; with --dry-run prints their commands.
start_all() {
    local index command port=$((20000 + RANDOM % 10000))
    for ((index = 0; index < processes; index++)); do
        command=("${PYTHON:-.venv/bin/python}" -m launch.train "${train[@]}")
        ((processes == 1)) || command=(
            env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$index"
            "JAX_LOCAL_DEVICE_IDS=$index" "${command[@]}"
        )
        if [ -n "$dry_run" ]; then
            run "${command[@]}"
        else
            start "$logs/$HOSTNAME.$index.log" "${command[@]}"
        fi
    done
}

# Waits until all processes have ended; `worst` is then the highest code.
wait_for_all() {
    local ended code
    worst=0
    while [ ${#running[@]} -gt 0 ]; do
        ended=''
        wait -n -p ended "${!running[@]}" $timer
        code=$?
        if [ -z "$ended" ]; then
            continue # a signal came, no process ended
        elif [ "$ended" = "$timer" ]; then
            timer=''
            kill -KILL "${!running[@]}"
            continue
        fi
        unset "running[$ended]"
        case $code in 0 | 2 | 3) ;; *) code=1 ;; esac
        ((code <= worst)) || worst=$code
        if [ $worst != 0 ] && [ -z "$timer" ]; then
            sleep $GRACE >/dev/null 2>&1 &
            timer=$!
        fi
    done
    [ -z "$timer" ] || kill "$timer"
    timer=''
    wait "${writers[@]}"
}

[ -n "$dry_run" ] || mkdir -p "$logs"
for ((number = 1; ; number++)); do
    start_all
    [ -z "$dry_run" ] || exit 0
    wait_for_all
    if [ $worst != 1 ] || [ -n "$asked" ] || ((number >= starts)); then exit $worst; fi
    echo "$0: start $number of $starts ended early, the next one continues" >&2
done
