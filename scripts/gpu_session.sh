#!/usr/bin/env bash
# What a GPU is for here, part by part, unattended and within a time limit:
#
#   scripts/gpu_session.sh PART… [--seconds 540] [--out FOLDER] [--tiny] [--data CIFAR] [--photos FOLDER]
#
#   right     the tests marked gpu, and those beside them
#   step      an optimizer step beside timm's plain loop
#   layers    the layers alone, eager and compiled, and the bytes that they move
#   together  how many trainings at once a card takes, as processes and as streams
#   table     CIFAR-10, ResNet-20, ghost; direct: a step for every batch of 2; resnet34: PWS's table
#   pipeline  photographs: how many a second, and whether the GPU waits for them
#
# Each part ends within its seconds, keeps what it has, and goes on from there when it is called
# again: cell by cell into FOLDER/PART.json (default: results/gpu/<card>), a short table last. It
# runs on the python3 in the PATH, needs no network, and rehearses on a CPU with --tiny.
# `python3 -m benchmarks.gpu --help` has more options, which can be given here too.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=() options=() seconds=540
while (($#)); do
  case $1 in
    --seconds) seconds=${2-} && shift ;;
    --tiny) options+=("$1") ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    --*) options+=("$1" "${2-}") && shift ;;
    *) parts+=("$1") ;;
  esac
  shift
done
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]] || ((${#parts[@]} == 0)); then
  echo "error: expected scripts/gpu_session.sh PART… --seconds N; --help lists the parts" >&2
  exit 2
fi

export PYTHONUNBUFFERED=1
again=75 # its exit status when the device no longer answers: a fresh process may go on
worst=0
for part in "${parts[@]}"; do
  end=$(($(date +%s) + seconds)) status=$again
  while ((status == again && $(date +%s) < end)); do
    timeout -k 2 $((end - $(date +%s) + 1)) \
      python3 -m benchmarks.gpu "$part" --until $end "${options[@]}"
    status=$?
  done
  ((status > worst)) && worst=$status
done
exit $worst
