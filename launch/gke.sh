#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster with JobSet: builds and pushes an image, then applies a JobSet of one pod a host.
#
#     launch/gke.sh --name=rcm --topology=v5p:4x4x4 --image=us-docker.pkg.dev/PROJECT/REPOSITORY/rcm --volume=runs -- \
#         --config=configs/wan2_1_t2v_14b.py --workdir=/runs/wan_14b --config.mesh.fsdp=64
#
# The words after "--" go to `python -m launch.train` as they are. Before it:
#   --name=NAME      the JobSet
#   --topology=T     v5e, v5p, v6e or tpu7x, and its shape: that of a node pool of the cluster
#   --image=IMAGE    where the image goes
#   --volume=CLAIM   a persistent volume claim for all pods (ReadWriteMany), seen by them as /CLAIM: --workdir lies there
#   --restarts=N     how often a run that ended early starts again (100)
#   --dry-run        print the commands only
# `kubectl logs` shows each pod's output, and `kubectl delete jobset NAME` ends the run after a checkpoint.

set -euo pipefail
# shellcheck source=launch/options.sh
source "$(dirname "$0")/options.sh"

name='' topology='' image='' volume='' restarts=100 dry_run=''
read_options "name topology image volume restarts dry-run" "$@"
[ ${#others[@]} = 0 ] || fail "unknown option ${others[0]}: see --help"
require_integers 0 restarts
for option in name topology image volume; do
    [ -n "${!option}" ] || fail "--$option is missing: see --help"
done
case $topology in
v5e:*) accelerator=tpu-v5-lite-podslice ;;
v5p:*) accelerator=tpu-v5p-slice ;;
v6e:*) accelerator=tpu-v6e-slice ;;
tpu7x:*) accelerator=tpu7x ;;
*) fail "--topology=$topology must be v5e, v5p, v6e or tpu7x and a shape, as v5p:4x4x4" ;;
esac
shape=${topology#*:}
[[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology must end in a shape, as v5p:4x4x4"
((${shape//x/*} % 4 == 0)) || fail "--topology=$topology must have a multiple of four chips, as v5p:2x2x1"
hosts=$((${shape//x/*} / 4)) # each host of a slice of several has four chips

# The words as a YAML list. Kubernetes would replace "$(NAME)"; "$$" stands for a dollar.
list() {
    # shellcheck disable=SC2016
    python3 -c 'import json, sys; print(json.dumps([word.replace("$(", "$$(") for word in sys.argv[1:]]))' "$@"
}

run docker build --tag="$image" --file=launch/Dockerfile .
run docker push "$image"
feed "apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2, 3]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $shape
            containers:
            - name: train
              image: $image
              command: $(list launch/host.sh --starts=1 -- --distributed "${train[@]}")
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits: {google.com/tpu: 4}
              volumeMounts:
              - {name: runs, mountPath: /$volume}
            volumes:
            - name: runs
              persistentVolumeClaim: {claimName: $volume}" \
    kubectl apply --filename=-
