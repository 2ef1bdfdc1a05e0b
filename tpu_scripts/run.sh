#!/usr/bin/env bash
# Gets a pod, starts a command on it, and looks after both until the run is complete: a pod that is preempted is made
# anew, a run that crashed is started again. Then deletes the pod; what the run wrote is in the bucket.
#
#     tpu_scripts/run.sh --name=NAME --type=v3-256 --zone=ZONE --spot --run=RUN --bucket=gs://BUCKET/runs -- python ...
#
# Exit status 0: the run is complete. 1: it has failed --failures times. 2: the command is wrong. 3: the name belongs to
# something else. 4: the quota does not allow the pod. 5: stop.sh has ended the run. It may be stopped (Ctrl-C) and
# started again at any time.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_flags "$@"
need NAME TYPE BUCKET
need_command
complete_command
need_kept_output

if [[ -n $DRY_RUN ]]; then # the life of a run to which nothing happens
  create_or_explain
  wait_for_pod
  setup_pod
  launch_run
  run_states
  delete_pod
  exit
fi

failures=0 looked=''
while true; do
  case $(pod_state) in
    NONE)
      say "asking for $NAME, a $TYPE"
      create_or_explain
      continue
      ;;
    GONE | FAILED)
      say "$NAME is gone: asking for another one"
      delete_pod
      continue
      ;;
    WAITING)
      wait_for_pod || true
      continue
      ;;
  esac
  case $(status_of_run) in
    NEW)
      say "setting up $NAME"
      setup_pod
      launch_run
      ;;
    RUNNING) ;;
    DONE)
      say "$RUN is complete: deleting $NAME"
      delete_pod
      say DONE
      exit 0
      ;;
    WRONG)
      show_logs -n 5 >&2 || true
      die 2 "the command of $RUN is wrong; $NAME is left as it is"
      ;;
    ENDED) # on our first look: before we were started, to go on with it
      if [[ -n $looked ]]; then
        say "stop.sh has ended $RUN; $NAME is left as it is"
        exit "$ENDED_STATUS"
      fi
      say "going on with $RUN, which stop.sh had ended"
      launch_run
      ;;
    STOPPED)
      say "$RUN was asked to end: starting it again"
      launch_run
      ;;
    UNREACHABLE)
      say "the machines of $NAME do not answer"
      ;;
    CRASHED)
      failures=$((failures + 1))
      show_logs -n 20 >&2 || true
      if ((failures >= FAILURES)); then
        die "$FAILED_STATUS" "$RUN has failed $failures times; $NAME is left as it is"
      fi
      say "$RUN has failed ($failures of $FAILURES): starting it again"
      stop_run || true
      launch_run
      ;;
  esac
  looked=yes
  sleep "$EVERY"
done
