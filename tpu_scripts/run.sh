#!/usr/bin/env bash
# Gets a pod, starts a command on it, and looks after both until the run is complete: a pod that is preempted is made
# anew, a run that crashed is started again. Then deletes the pod; what the run wrote is in the bucket.
#
#     tpu_scripts/run.sh --name=NAME --type=v3-256 --zone=ZONE --spot --run=RUN --bucket=gs://BUCKET/runs -- python ...
#
# Exit status 0: the run is complete. 1: it, or a step on the way to it, has failed --failures times. 2: the command is
# wrong. 3: the name belongs to something else. 4: the quota does not allow the pod. 5: stop.sh has ended the run.
# It may be stopped (Ctrl-C) and started again at any time.

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

# Troubles in a row, crashes of the run, pods asked for since the last one that came, and looks at the pod without an
# answer; then whether there was one, whether the run was looked at, is complete, or has yet to be started again.
troubles=0 failures=0 asked=0 blind=0 answered='' looked='' complete='' starting=''

attempt() { # attempt WHAT COMMAND...: where a step fails, the next look comes to it again
  local what=$1
  shift
  if "$@"; then
    troubles=0
    return 0
  fi
  troubles=$((troubles + 1))
  ((troubles < FAILURES)) || die "$FAILED_STATUS" "cannot $what, tried $troubles times; $NAME is left as it is"
  say "cannot $what ($troubles of $FAILURES): trying again"
  return 1
}

set_up() { setup_pod && launch_run; }

start_again() {
  starting=yes
  if attempt "start $RUN" launch_run; then starting=''; fi
}

look_after_pod() { # returns 0 where its machines can be asked about the run
  local state
  state=$(pod_state)
  if [[ $state == UNKNOWN ]]; then # nothing is made or deleted on a guess
    blind=$((blind + 1))
    [[ -n $answered ]] || ((blind < FAILURES)) ||
      die "$FAILED_STATUS" "gcloud cannot tell what $NAME is, asked $blind times"
    say "cannot tell what $NAME is: looking again"
    return 1
  fi
  answered=yes
  case $state in
    ACTIVE)
      asked=0
      [[ -n $complete ]] || return 0
      attempt "delete $NAME" delete_pod
      ;;
    NONE)
      if [[ -n $complete ]]; then
        say DONE
        exit 0
      fi
      say "asking for $NAME, a $TYPE"
      if attempt "create $NAME" create_or_explain; then asked=$((asked + 1)); fi
      ;;
    WAITING) wait_for_pod ;;
    DELETING) say "$NAME is being deleted" ;;
    GONE)
      say "$NAME is gone: asking for another one"
      attempt "delete $NAME" delete_pod
      ;;
    FAILED)
      why_failed >&2
      ((asked < FAILURES)) || die "$FAILED_STATUS" "$NAME was asked for $asked times and not given; it is left as it is"
      say "$NAME was not given: asking for another one"
      attempt "delete $NAME" delete_pod
      ;;
  esac
  return 1
}

look_after_run() {
  case $(status_of_run) in
    NEW)
      say "setting up $NAME"
      starting=''
      attempt "set up $NAME" set_up
      ;;
    RUNNING) starting='' ;;
    DONE)
      say "$RUN is complete: deleting $NAME"
      complete=yes
      attempt "delete $NAME" delete_pod
      ;;
    WRONG)
      show_logs -n 5 >&2
      die 2 "the command of $RUN is wrong; $NAME is left as it is"
      ;;
    ENDED) # on our first look: before we were started, to go on with it
      if [[ -n $looked && -z $starting ]]; then
        say "stop.sh has ended $RUN; $NAME is left as it is"
        exit "$ENDED_STATUS"
      fi
      say "going on with $RUN, which stop.sh had ended"
      start_again
      ;;
    STOPPED)
      say "$RUN was asked to end: starting it again"
      start_again
      ;;
    UNREACHABLE)
      say "the machines of $NAME do not answer"
      ;;
    CRASHED)
      if [[ -z $starting ]]; then
        failures=$((failures + 1))
        show_logs -n 20 >&2
        if ((failures >= FAILURES)); then
          die "$FAILED_STATUS" "$RUN has failed $failures times; $NAME is left as it is"
        fi
        say "$RUN has failed ($failures of $FAILURES): starting it again"
        stop_run
      fi
      start_again
      ;;
  esac
  looked=yes
}

while true; do # what fails has had its line, and is looked at again
  if look_after_pod; then look_after_run || true; fi
  sleep "$EVERY"
done
