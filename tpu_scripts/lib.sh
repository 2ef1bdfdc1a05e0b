#!/usr/bin/env bash
# What the scripts of this folder share: flags, gcloud, and the states that a pod goes through. docs/pods.md explains.
#
# A pod is a queued resource of Cloud TPU with one node of the same name. Every function that asks Google Cloud to
# change something goes through `cloud`, which --dry_run turns into a line of text.

set -euo pipefail

# Exit statuses, besides 0 for success and 2 for a wrong command.
FAILED_STATUS=1 # what was asked for has failed
TAKEN_STATUS=3  # the name is taken
QUOTA_STATUS=4  # the quota does not allow the pod
# shellcheck disable=SC2034  # for run.sh
ENDED_STATUS=5 # stop.sh has ended the run

SCRATCH=$(mktemp -d) # for this script alone: several may run at a time
trap 'rm -rf "$SCRATCH"' EXIT

# What libtpu and XLA are told, each with its reason. Override it all with --libtpu_args.
LIBTPU_ARGS=(
  # Weights that are split over fsdp are gathered layer by layer. Fused into the matrix products before them, the
  # gathers cost time only where they take longer than the products.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  # One gather may stretch over several products: a layer's small ones are too short to hide it.
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # Lets the core compute while a collective is under way, which is what the fusion above is for.
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)

say() { printf 'pod: %s\n' "$*" >&2; }

die() { # die STATUS MESSAGE
  local status=$1
  shift
  printf 'pod: error: %s\n' "$*" >&2
  exit "$status"
}

usage() { # the comment at the top of the script, and the flags
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  cat >&2 <<'EOF'
flags:
  --name=NAME          of the pod
  --type=TYPE          accelerator type, as in v3-256, v4-128, v5litepod-64, v5p-128, v6e-64
  --zone=ZONE          where it is; empty: gcloud's own setting
  --project=PROJECT    who pays; empty: gcloud's own setting
  --spot, --reserved   cheap but preemptible, or from a reservation; neither: on demand
  --version=VERSION    image of the machines; empty: that of the type
  --network=NETWORK    empty: the default network
  --internal_ips       machines without public addresses; ssh goes through Google's tunnel
  --run=NAME           name of the run, for files; empty: the pod's
  --bucket=gs://PATH   the run's folder is kept at PATH/RUN too, so that it outlives the pod; for run.sh a must
  --secrets=FILE       lines NAME=VALUE, as of HF_TOKEN and WANDB_API_KEY: setup.sh and run.sh copy it to the machines,
                       where it is the environment of what they run
  --libtpu_args=ARGS   instead of those in lib.sh
  --every=SECONDS      between two looks at a pod (30)
  --failures=N         after so many crashes, or failures of one step in a row, run.sh gives up (3); preemptions do not
                       count
  --dry_run            print every gcloud command instead of running it
  -- COMMAND           what every machine runs, as in: -- python -m easyrl.train_ppo --config=...
                       a trainer writes into runs/RUN, the folder that --bucket keeps
EOF
}

parse_flags() { # sets NAME, TYPE, ... and COMMAND from the command line
  NAME='' TYPE='' ZONE='' PROJECT='' PRICING='' VERSION='' NETWORK='' INTERNAL_IPS='' RUN='' BUCKET='' DRY_RUN=''
  SECRETS='' EVERY=30 FAILURES=3 TUNNEL=() COMMAND=()
  local libtpu=''
  while (($#)); do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --type=*) TYPE=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --spot | --reserved)
        [[ -z $PRICING ]] || die 2 "$1: expected one of --spot and --reserved"
        PRICING=$1
        ;;
      --version=*) VERSION=${1#*=} ;;
      --network=*) NETWORK=${1#*=} ;;
      --internal_ips)
        INTERNAL_IPS=yes
        TUNNEL=(--tunnel-through-iap)
        ;;
      --run=*) RUN=${1#*=} ;;
      --bucket=*) BUCKET=${1#*=} ;;
      --secrets=*) SECRETS=${1#*=} ;;
      --libtpu_args=*) libtpu=${1#*=} ;;
      --every=*) EVERY=${1#*=} ;;
      --failures=*) FAILURES=${1#*=} ;;
      --dry_run) DRY_RUN=yes ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        COMMAND=("$@")
        break
        ;;
      *) die 2 "$1: unknown; --help tells what there is" ;;
    esac
    shift
  done
  if [[ -n $libtpu ]]; then read -ra LIBTPU_ARGS <<<"$libtpu"; fi
  : "${RUN:=$NAME}"
  local label='^[a-z][a-z0-9-]{0,60}$'
  [[ -z $NAME || $NAME =~ $label ]] || die 2 "--name=$NAME: expected small letters, digits and dashes"
  [[ -z $RUN || $RUN =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die 2 "--run=$RUN: expected letters, digits, dashes and dots"
  [[ -z $BUCKET || $BUCKET =~ ^gs://[A-Za-z0-9._/-]+$ ]] || die 2 "--bucket=$BUCKET: expected gs://BUCKET or a path in it"
  [[ $EVERY =~ ^[0-9]+$ && $FAILURES =~ ^[0-9]+$ ]] || die 2 "--every and --failures: expected whole numbers"
  BUCKET=${BUCKET%/}
  check_secrets
}

check_secrets() { # a shell is to read the file and run nothing; no message repeats what is in it
  [[ -n $SECRETS ]] || return 0
  [[ -r $SECRETS ]] || die 2 "--secrets=$SECRETS: there is no such file"
  local line number=0 plain='[^]["'\''$`\;&|<>(){}*?!~#[:space:]]*' double='"[^"$`\]*"' single="'[^']*'"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ || $line =~ ^(export )?[A-Za-z_][A-Za-z0-9_]*=($plain|$double|$single)$ ]] ||
      die 2 "--secrets=$SECRETS, line $number: expected NAME=VALUE, in quotes where it has signs of the shell's"
  done <"$SECRETS"
}

need() { # need VARIABLE...: those flags must have been given
  local variable
  for variable in "$@"; do
    [[ -n ${!variable} ]] || die 2 "--${variable,,} is missing; --help tells what there is"
  done
}

need_command() {
  ((${#COMMAND[@]})) || die 2 "what to run is missing; expected it after --, as in: -- python -m easyrl.train_ppo ..."
}

shown() { # a command as one would type it
  local word line='' quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/$quote}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

cloud() { # gcloud with the project and the zone; under --dry_run a line of text
  local place=()
  [[ -z $PROJECT ]] || place+=("--project=$PROJECT")
  [[ -z $ZONE ]] || place+=("--zone=$ZONE")
  if [[ -n $DRY_RUN ]]; then
    shown gcloud "$@" "${place[@]}"
  else
    gcloud "$@" "${place[@]}"
  fi
}

runtime_version() { # the image that fits TYPE; https://cloud.google.com/tpu/docs/runtimes
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die 2 "--type=$1: no image is known for it; give --version" ;;
  esac
}

cores_per_chip() { # what the number in an accelerator type counts
  case $1 in
    v2-* | v3-* | v4-* | v5p-*) echo 2 ;;
    *) echo 1 ;;
  esac
}

# ---------------------------------------------------------------- states

# described KIND FIELD: of the pod, or NOT_FOUND, or UNKNOWN and gcloud's reason where it does not get to know
described() {
  local value errors=$SCRATCH/errors
  if value=$(cloud compute tpus "$1" describe "$NAME" "--format=value($2)" 2>"$errors"); then
    printf '%s\n' "$value"
  elif grep -q NOT_FOUND "$errors"; then
    echo NOT_FOUND
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
}

# NONE, WAITING, ACTIVE, GONE (preempted, or its node has vanished), DELETING, FAILED, or UNKNOWN, which is none of them
pod_state() {
  case $(described queued-resources state.state) in
    ACTIVE)
      case $(described tpu-vm state) in
        READY) echo ACTIVE ;;
        CREATING | STARTING | RESTARTING | REPAIRING) echo WAITING ;;
        UNKNOWN) echo UNKNOWN ;;
        *) echo GONE ;;
      esac
      ;;
    NOT_FOUND) echo NONE ;;
    UNKNOWN) echo UNKNOWN ;;
    DELETING) echo DELETING ;;
    SUSPENDING | SUSPENDED) echo GONE ;;
    FAILED) echo FAILED ;;
    *) echo WAITING ;;
  esac
}

create_pod() { # asks for the pod; returns TAKEN_STATUS or QUOTA_STATUS where that is why not
  local arguments=(compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE")
  arguments+=("--runtime-version=$VERSION")
  [[ -z $PRICING ]] || arguments+=("$PRICING")
  [[ -z $NETWORK ]] || arguments+=("--network=$NETWORK")
  [[ -z $INTERNAL_IPS ]] || arguments+=(--internal-ips)
  if [[ -n $DRY_RUN ]]; then
    cloud "${arguments[@]}"
    return
  fi
  local answer
  if answer=$(cloud "${arguments[@]}" 2>&1); then return 0; fi
  printf '%s\n' "$answer" >&2
  case ${answer,,} in
    *already?exists*) return "$TAKEN_STATUS" ;;
    *quota*) return "$QUOTA_STATUS" ;;
    *) return "$FAILED_STATUS" ;;
  esac
}

why_failed() { cloud compute tpus queued-resources describe "$NAME" '--format=yaml(state)'; }

create_or_explain() { # create_pod; ends with a line where asking again is no use, and else returns FAILED_STATUS
  local status=0
  [[ -n $VERSION ]] || VERSION=$(runtime_version "$TYPE") || exit 2
  create_pod || status=$?
  case $status in
    0) ;;
    "$TAKEN_STATUS") die "$TAKEN_STATUS" "the name $NAME is taken: take another, or delete.sh --name=$NAME" ;;
    "$QUOTA_STATUS")
      die "$QUOTA_STATUS" "the quota does not allow a ${PRICING#--} $TYPE in ${ZONE:-this zone}: ask for more under IAM & Admin, Quotas"
      ;;
    *) return "$FAILED_STATUS" ;;
  esac
}

wait_for_pod() { # until the pod is ACTIVE (0) or will not become so (1)
  if [[ -n $DRY_RUN ]]; then
    cloud compute tpus queued-resources describe "$NAME" '--format=value(state.state)'
    cloud compute tpus tpu-vm describe "$NAME" '--format=value(state)'
    return
  fi
  local state last=''
  while true; do
    state=$(pod_state)
    [[ $state == "$last" ]] || say "$NAME is $state"
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      GONE | DELETING | FAILED | NONE) return 1 ;;
    esac
    sleep "$EVERY"
  done
}

delete_pod() { # the node and the request for it
  cloud compute tpus queued-resources delete "$NAME" --force --quiet
}

# ---------------------------------------------------------------- machines

on_workers() { # on_workers COMMAND: by ssh, on all machines at once
  cloud compute tpus tpu-vm ssh "$NAME" --worker=all --batch-size=all "${TUNNEL[@]}" --quiet "--command=$1"
}

to_workers() { # to_workers FILE NAME: by scp, into the home of all machines
  cloud compute tpus tpu-vm scp "$1" "$NAME:$2" --worker=all "${TUNNEL[@]}" --quiet
}

copy_secrets() { # scp gives a new file the mode of its source
  [[ -n $SECRETS ]] || return 0
  local copy=$SECRETS
  if [[ -z $DRY_RUN ]]; then
    copy=$SCRATCH/easyrl.secrets
    install -m 600 "$SECRETS" "$copy" || return
  fi
  to_workers "$copy" easyrl.secrets && on_workers 'chmod 600 easyrl.secrets'
}

# This checkout and its dependencies on every machine, and the secrets. The steps are joined by hand: `set -e` does
# nothing where a caller asks whether they have worked.
setup_pod() {
  local source archive=$SCRATCH/easyrl.tar.gz
  if [[ -n $DRY_RUN ]]; then
    printf 'git archive --output=easyrl.tar.gz HEAD\n'
    archive=easyrl.tar.gz
  else
    source=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel) &&
      git -C "$source" archive --output="$archive" HEAD || return
  fi
  to_workers "$archive" easyrl.tar.gz && copy_secrets &&
    on_workers 'mkdir -p easyrl && tar -xzf easyrl.tar.gz -C easyrl && cd easyrl && bash tpu_scripts/worker_setup.sh'
}

is_trainer() { [[ " ${COMMAND[*]} " == *' -m easyrl.train_'* ]]; } # whether COMMAND is one of ours

value_of() { # value_of FLAG: what COMMAND gives it, as FLAG=VALUE or FLAG VALUE; status 1 where it gives nothing
  local word before='' value
  for word in "${COMMAND[@]}"; do
    if [[ $word == "$1="* ]]; then
      value=${word#*=}
    elif [[ $before == "$1" ]]; then
      value=$word
    fi
    before=$word
  done
  [[ -v value ]] && printf '%s\n' "$value"
}

complete_command() { # adds to a trainer's flags those that follow from the pod's, unless they are given
  is_trainer || return 0
  local more=(--jax_distributed.initialize_jax_distributed=True "--output_dir=runs/$RUN") flag
  [[ -z $BUCKET ]] || more+=("--checkpoint_dir=$BUCKET/$RUN/checkpoints")
  for flag in "${more[@]}"; do
    value_of "${flag%%=*}" >/dev/null || COMMAND+=("$flag")
  done
}

need_kept_output() { # what a trainer writes elsewhere than in runs/RUN is not in the bucket, and goes with the pod
  if [[ -z $BUCKET ]] || ! is_trainer; then return 0; fi
  local output
  output=$(value_of --output_dir) # complete_command has seen to it that there is one
  [[ ${output%/} == "runs/$RUN" ]] ||
    die 2 "--output_dir=$output: expected runs/$RUN, the folder that is kept in the bucket; --run gives it its name"
}

# Starts COMMAND on every machine and returns; fails, with a line of the machine's, where one cannot start it.
launch_run() {
  local words start
  printf -v words ' %q' "${COMMAND[@]}"
  start="[ -e easyrl/.venv ] || { echo \"\$(hostname): not set up: setup.sh does that\" >&2; exit 1; }; "
  start+="cd easyrl && export RUN=$RUN BUCKET=$BUCKET LIBTPU_INIT_ARGS='${LIBTPU_ARGS[*]}' && "
  start+="bash tpu_scripts/worker.sh || exit 1; " # without a command it tells whether it would start one
  # ssh waits for whatever holds its output, the shell in the background too.
  on_workers "${start}nohup bash tpu_scripts/worker.sh$words > /dev/null 2>&1 < /dev/null & sleep 1"
}

# For the shell of a machine: sets `state` to none, running, ended, stopped, or the exit status of its process.
look_at_run() {
  printf '%s' "read -r state pid <easyrl/runs/$RUN/status.\$(hostname) || state=none; "
  printf '%s' "[ \$state != running ] || kill -0 \$pid || state=137; " # it was killed, if only by the machine's restart
}

run_states() { # one line a machine
  on_workers "$(look_at_run)echo \$state"
}

# NEW, RUNNING, DONE, ENDED (by stop.sh), STOPPED (asked to end by something else, and saved), WRONG (a wrong command),
# CRASHED or UNREACHABLE
status_of_run() {
  local states state all=0 running=0 wrong=0 none=0 ended=0 stopped=0 failed=0
  states=$(run_states 2>/dev/null) || states=''
  for state in $states; do
    all=$((all + 1))
    case $state in
      running) running=$((running + 1)) ;;
      none) none=$((none + 1)) ;;
      ended) ended=$((ended + 1)) ;;
      stopped) stopped=$((stopped + 1)) ;;
      0) ;;
      2) wrong=$((wrong + 1)) ;;
      *) failed=$((failed + 1)) ;;
    esac
  done
  if ((all == 0)); then
    echo UNREACHABLE # no answer is not a good one
  elif ((running)); then
    echo RUNNING # those that have ended take the others with them
  elif ((wrong)); then
    echo WRONG
  elif ((ended)); then
    echo ENDED
  elif ((none == all)); then
    echo NEW
  elif ((none)); then
    echo CRASHED
  elif ((stopped)); then
    echo STOPPED # machines that were then taken away may say that they failed
  elif ((failed)); then
    echo CRASHED
  else
    echo DONE
  fi
}

show_logs() { # show_logs [tail's options]: the end of every machine's log, each line with the machine's name
  on_workers "tail $* easyrl/runs/$RUN/log.\$(hostname) | sed -u \"s/^/\$(hostname): /\""
}

# SIGTERM to the process of every machine: it saves, and ends, which is waited for. The file tells worker.sh who asked.
stop_run() {
  local ask="(cd easyrl/runs/$RUN && touch end.\$(hostname) && kill -TERM \$(cat pid.\$(hostname)))"
  on_workers "{ $ask; while $(look_at_run)[ \$state = running ]; do sleep 1; done; } 2>/dev/null"
}
