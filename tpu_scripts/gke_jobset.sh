#!/usr/bin/env bash
# Prints the manifest of a run on TPUs of Google Kubernetes Engine, as a JobSet: for `kubectl apply -f -`.
#
#     tpu_scripts/gke_jobset.sh --name=NAME --accelerator=v5p --topology=4x4x8 --image=IMAGE [--slices=1] \
#         [--restarts=20] [--spot] [--secret=NAME] \
#         -- python -m easyrl.train_ppo --config=... --checkpoint_dir=gs://BUCKET/NAME
#
# One pod of Kubernetes runs on each machine of a slice, and JAX finds the others from what GKE tells it. When a node is
# preempted or a process fails, the JobSet starts all pods anew, and the run goes on from its last checkpoint. The
# cluster needs the JobSet controller and a node pool of that accelerator and topology; the image needs easyrl[tpu].
# What the Secret called --secret holds, as HF_TOKEN, is in the environment of the run.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

accelerator='' topology='' image='' secret='' slices=1 restarts=20 rest=()
while (($#)); do
  case $1 in
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --secret=*) secret=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --)
      rest+=("$@")
      break
      ;;
    *) rest+=("$1") ;;
  esac
  shift
done
parse_flags "${rest[@]}"
need NAME
need_command
[[ -n $image ]] || die 2 '--image is missing: the container image with easyrl[tpu]'
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die 2 "--topology=$topology: expected chips by dimension, as in 4x4x8"
case $accelerator in # the node label, and the chips of one machine
  v3) label=tpu-v3-slice chips_per_host=4 ;;
  v4) label=tpu-v4-podslice chips_per_host=4 ;;
  v5e) label=tpu-v5-lite-podslice chips_per_host=4 ;;
  v5p) label=tpu-v5p-slice chips_per_host=4 ;;
  v6e) label=tpu-v6e-slice chips_per_host=4 ;;
  *) die 2 "--accelerator=$accelerator: expected v3, v4, v5e, v5p or v6e" ;;
esac
chips=$((${topology//x/*}))
((chips % chips_per_host == 0)) || die 2 "--topology=$topology: $chips chips are no multiple of $chips_per_host, those of a machine"
complete_command

quoted() { # a YAML string
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # One slice a job: the pods of two jobs never share a node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $((chips / chips_per_host))
          completions: $((chips / chips_per_host))
          # A process that ends takes the others down with it: only all of them can be started again.
          backoffLimit: 0
          template:
            spec:
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              restartPolicy: Never
              # Between SIGTERM and SIGKILL: a step and a checkpoint.
              terminationGracePeriodSeconds: 600
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $label
                cloud.google.com/gke-tpu-topology: $topology
EOF
[[ $PRICING != --spot ]] || printf '                cloud.google.com/gke-spot: "true"\n'
cat <<EOF
              containers:
                - name: easyrl
                  image: $(quoted "$image")
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu
                    - name: LIBTPU_INIT_ARGS
                      value: $(quoted "${LIBTPU_ARGS[*]}")
EOF
[[ -z $secret ]] || printf '                  envFrom:\n                    - secretRef: {name: %s}\n' "$(quoted "$secret")"
cat <<EOF
                  ports:
                    - containerPort: 8471 # TPU runtimes of a slice
                    - containerPort: 8476 # JAX's coordinator
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
                  # Hands SIGTERM on. A run that was asked to end exits with 0 as a complete one does; its last line
                  # tells them apart, and 75 has the JobSet start it again.
                  command: ["bash", "-c"]
                  args:
                    - |
                      trap 'asked=1; kill -TERM \$run' TERM
                      "\$@" > /tmp/log 2>&1 & run=\$!
                      tail -f -n +1 /tmp/log & shown=\$!
                      wait \$run; status=\$?
                      if [ -n "\$asked" ]; then wait \$run; status=\$?; fi
                      sleep 1; kill \$shown
                      if [ "\$status" = 0 ] && tail -n 5 /tmp/log | grep -q ': stopped after step '; then status=75; fi
                      exit "\$status"
                    - easyrl
EOF
for word in "${COMMAND[@]}"; do printf '                    - %s\n' "$(quoted "$word")"; done
