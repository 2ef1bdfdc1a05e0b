#!/usr/bin/env bash
# Runs a command on one machine of a pod, and leaves its log, process id and exit status in runs/$RUN. launch.sh starts
# it in the checkout, on every machine.
#
# Until there is an exit status, `running` stands for it, with the process id of this script, which outlives the command
# by a copy: a machine that restarts keeps the file and loses the process. For a command that was asked to end it is
# `ended` if stop.sh did that, and else `stopped`.

set -uo pipefail
folder=runs/$RUN
host=$(hostname)
mkdir -p "$folder"
rm -f "$folder/end.$host"
echo "running $$" >"$folder/status.$host"
# shellcheck disable=SC1091  # made by setup.sh
source .venv/bin/activate

# The run's folder goes to the bucket, and comes back from there on a new pod. Machines have files of their own in it;
# only the first writes the others. Checkpoints go to the bucket by themselves, with --checkpoint_dir.
number=$(curl -s -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0)
copy() {
  local exclude='^(checkpoints/.*|(status|pid|end)\..*)$'
  if gcloud storage rsync --recursive "--exclude=$exclude" "$1" "$2" >/dev/null 2>&1; then return 0; fi
  echo "pod: cannot copy $1 to $2" >>"$folder/log.$host"
  return 1
}
copy_every_minute() {
  trap exit TERM # after the copy under way, so that none is behind the last one
  while true; do
    sleep 60 &
    wait $!
    copy "$folder" "$BUCKET/$RUN"
  done
}
copy_at_last() { # a store may be away for some minutes
  local pause
  for pause in 0 10 60 300; do
    sleep "$pause"
    if copy "$folder" "$BUCKET/$RUN"; then return 0; fi
  done
  return 1
}
if [[ -n ${BUCKET:-} && $number == 0 ]]; then
  copy "$BUCKET/$RUN" "$folder"
  copy_every_minute &
  copying=$!
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
  if ! copy_at_last && [[ $status == 0 ]]; then status=1; fi
fi
echo "$status" >"$folder/status.$host"
