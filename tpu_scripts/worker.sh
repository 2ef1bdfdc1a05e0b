#!/usr/bin/env bash
# Runs a command on one machine of a pod, and leaves its log, process id and exit status in runs/$RUN. launch.sh starts
# it in the checkout, on every machine. It refuses while the same run is running there; without a command it only tells
# whether it would.
#
# Until there is an exit status, `running` stands for it, with the process id of this script, which outlives the command
# by a copy: a machine that restarts keeps the file and loses the process. For a command that was asked to end it is
# `ended` if stop.sh did that, and else `stopped`.

set -uo pipefail
folder=runs/$RUN
host=$(hostname)
mkdir -p "$folder"
# Two would write the same files, and the first to end would remove what the other goes by. A run that was asked to end
# may still be saving.
read -r state pid 2>/dev/null <"$folder/status.$host"
if [[ ${state:-} == running ]] && kill -0 "$pid" 2>/dev/null; then
  echo "$host: $RUN is still running" >&2
  exit 1
fi
(($#)) || exit 0
rm -f "$folder/end.$host"
echo "running $$" >"$folder/status.$host"
# shellcheck disable=SC1091  # made by setup.sh
source .venv/bin/activate
if [[ -e ~/easyrl.secrets ]]; then # from setup.sh --secrets
  set -a
  # shellcheck disable=SC1090
  source ~/easyrl.secrets
  set +a
fi

# The run's folder goes to the bucket, and comes back from there on a new pod. Machines have files of their own in it;
# only the first writes the others. Checkpoints go to the bucket by themselves, with --checkpoint_dir. Nothing is copied
# to the bucket before what is there has come back: the new metrics.jsonl would take the place of the old one. It comes
# back once to a machine, whose own folder is the newer one from then on.
number=$(curl -s -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
copy() {
  local exclude='^(checkpoints/.*|(status|pid|end|restored)\..*)$'
  if gcloud storage rsync --recursive "--exclude=$exclude" "$1" "$2" >/dev/null 2>&1; then return 0; fi
  echo "pod: cannot copy $1 to $2" >>"$folder/log.$host"
  return 1
}
restore() { # there is nothing in the bucket only where gcloud says so
  local answer
  [[ ! -e $folder/restored.$host ]] || return 0
  if answer=$(gcloud storage ls "$BUCKET/$RUN" 2>&1); then
    copy "$BUCKET/$RUN" "$folder" || return
  elif [[ $answer != *'matched no objects'* ]]; then
    printf 'pod: cannot look into %s: %s\n' "$BUCKET/$RUN" "$answer" >>"$folder/log.$host"
    return 1
  fi
  touch "$folder/restored.$host"
}
copy_every_minute() {
  trap exit TERM # after the copy under way, so that none is behind the last one
  while true; do
    sleep 60 &
    wait $!
    copy "$folder" "$BUCKET/$RUN"
  done
}
patiently() { # patiently COMMAND...: a store may be away for some minutes
  local pause
  for pause in 0 10 60 300; do
    sleep "$pause"
    if "$@"; then return 0; fi
  done
  return 1
}
if [[ -n ${BUCKET:-} && $number == 0 ]]; then
  if patiently restore; then
    copy_every_minute &
    copying=$!
  else
    echo "pod: $RUN is not started without what is in $BUCKET/$RUN" >>"$folder/log.$host"
    set -- false
  fi
fi

if [[ -e $folder/end.$host ]]; then set -- false; fi # stop.sh was faster
touch "$folder/log.$host"
earlier=$(wc -c <"$folder/log.$host")
"$@" >>"$folder/log.$host" 2>&1 &
echo $! >"$folder/pid.$host"
wait $!
status=$?
rm -f "$folder/pid.$host"
# A run that was asked to end has saved and exits with 0, as one does that is complete: its last line tells them apart.
last=$(tail -c +$((earlier + 1)) "$folder/log.$host" | tail -n 5)
if [[ $status == 0 && $last == *': stopped after step '* ]]; then status=stopped; fi
if [[ $status != 0 && -e $folder/end.$host ]]; then status=ended; fi
if [[ -n ${copying:-} ]]; then
  kill "$copying"
  wait "$copying"
  # With status 0 the pod may be deleted, and what is not in the bucket with it.
  if ! patiently copy "$folder" "$BUCKET/$RUN" && [[ $status == 0 ]]; then status=1; fi
fi
echo "$status" >"$folder/status.$host"
