#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, from any machine with gcloud: one process a host.
#
#     launch/tpu_vm.sh --name=rcm --zone=us-east5-a --topology=v5p:4x4x4 --spot -- \
#         --config=configs/wan2_1_t2v_14b.py --workdir=/mnt/shared/runs/wan_14b --config.mesh.fsdp=64
#
# The words after "--" go to `python -m launch.train` as they are. Before it:
#   --name=NAME      the slice, and the queued resource that asks for it
#   --zone=ZONE      where it is
#   --topology=T     v5e, v5p or v6e, and its shape: asked for where there is no slice of that name
#   --spot           ask for one that may be taken away
#   --restarts=N     how often a run that ended early starts again, on a new slice if need be (100)
#   --logs=DIR       start I keeps each host's output in DIR/start_I (logs)
#   --dry-run        print the commands only
# --workdir must be a folder that all hosts share. Ctrl-C ends the run after a checkpoint; the slice stays.

set -uo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "$0")/options.sh"

name='' zone='' topology='' spot='' restarts=100 logs=logs dry_run=''
read_options "name zone topology spot restarts logs dry-run" "$@"
[ ${#others[@]} = 0 ] || fail "unknown option ${others[0]}: see --help"
require_integers 0 restarts
[ -n "$name" ] && [ -n "$zone" ] || fail "--name and --zone say which slice: give both"
case $topology in
v5e:*) request=(--type=v5litepod --runtime-version=v2-alpha-tpuv5-lite) ;;
v5p:*) request=(--type=v5p --runtime-version=v2-alpha-tpuv5) ;;
v6e:*) request=(--type=v6e --runtime-version=v2-alpha-tpuv6e) ;;
'') ;;
*) fail "--topology=$topology must be v5e, v5p or v6e and a shape, as v5p:4x4x4" ;;
esac

queued() {
    run gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"
}

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all "$@"
}

# Asks for the slice and waits until it is there. A request whose slice was taken away makes room for a new one.
acquire() {
    local state=''
    while [ "$state" != ACTIVE ]; do
        [ -n "$dry_run" ] || state=$(queued describe --format='value(state.state)' 2>/dev/null)
        case $state in
        ACTIVE) ;;
        '')
            queued create --node-id="$name" "${request[@]}" --topology="${topology#*:}" ${spot:+--spot} || return
            [ -z "$dry_run" ] || return 0
            ;;
        FAILED | SUSPENDED) queued delete --force --quiet || return ;;
        *) sleep 30 ;;
        esac
    done
}

# Ends, after a checkpoint, what runs on the hosts. The brackets keep pkill from finding the shell that runs it.
stop() {
    on_all_hosts --command="pkill -f launch/[h]ost.sh; while pgrep -f launch/[h]ost.sh >/dev/null; do sleep 1; done"
}

# Copies what a run needs of the repository to all hosts, and installs.
install() {
    run tar -czf "$logs/rcm_jax.tgz" configs launch pallas_kernels rcm_jax requirements.txt &&
        run gcloud compute tpus tpu-vm scp "$logs/rcm_jax.tgz" "$name:" --zone="$zone" --worker=all &&
        on_all_hosts --command="mkdir -p rcm_jax && tar -xzf rcm_jax.tgz -C rcm_jax && rcm_jax/launch/install.sh tpu"
}

# Starts one process on every host and waits for all.
train() {
    run mkdir -p "$logs/start_$1" &&
        on_all_hosts --output-directory="$logs/start_$1" \
            --command="rcm_jax/launch/host.sh --starts=1 -- --distributed $(quote "${train[@]}")"
}

trap 'stop; exit 1' INT TERM
run mkdir -p "$logs"
for ((number = 1; ; number++)); do
    { [ -z "$topology" ] || acquire; } && stop && install && train "$number" && exit 0
    code=$?
    if [ $code = 2 ] || [ $code = 3 ] || ((number > restarts)); then exit $code; fi
    echo "$0: start $number ended early, the next one continues" >&2
    sleep 30
done
