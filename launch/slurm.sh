#!/usr/bin/env bash
# Trains on GPU nodes under SLURM: submits a job that runs one process a node, each with all the GPUs of its node.
#
#     launch/slurm.sh --nodes=8 --gpus-per-node=8 --partition=gpu --time=2-00:00 -- \
#         --config=configs/wan2_1_t2v_14b.py --workdir=runs/wan_14b --config.mesh.fsdp=64
#
# The words after "--" go to `python -m launch.train` as they are; those before it go to sbatch, except:
#   --restarts=N  how often a job that ended early queues again (100)
#   --logs=DIR    node NODE appends its output to DIR/NODE.0.log (logs)
#   --dry-run     print the commands only
# The repository and the run's folder must lie where all nodes see them. Preempted, or five minutes before the end of
# its time, the run is saved, and the job queues again.

set -euo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "$0")/options.sh"

restarts=100 logs=logs dry_run=''
read_options "restarts logs dry-run" "$@"
require_integers 0 restarts

command -v "${PYTHON:-.venv/bin/python}" >/dev/null || run launch/install.sh cuda13
run mkdir -p "$logs"
# JAX would give a process under SLURM one GPU. The job's code is the highest of the nodes': a task that SLURM killed
# would hide the reason, so the others are left to end by themselves, as they do.
feed "#!/usr/bin/env bash
export JAX_LOCAL_DEVICE_IDS=\$(seq -s, 0 \$((SLURM_GPUS_ON_NODE - 1)))
srun --kill-on-bad-exit=0 launch/host.sh --starts=1 $(quote "--logs=$logs") -- --distributed $(quote "${train[@]}")
code=\$?
if [ \$code = 1 ] || [ \$code -gt 3 ]; then
    [ \"\${SLURM_RESTART_COUNT:-0}\" -ge $restarts ] || scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code" \
    sbatch --job-name=rcm --ntasks-per-node=1 --exclusive --requeue --signal=TERM@300 --open-mode=append \
    --output="$logs/job_%j.log" "${others[@]}"
