#!/usr/bin/env bash
# The studies of this folder, each in the order in which it is worth most whenever it has to stop:
#
#   bash results/cifar10/study.sh FOLDER PART     FOLDER: CIFAR-10 as train/<class>/<image>, test/...
#
# PART is lr (learning rates), runs (the study) or direct (a step for every two images). It trains with
# the code of COMMIT, in a worktree of it at WORK, a run on each of two cores. What is finished is copied
# to PART/ here (all but checkpoints and events) within a minute, and put back first, so the same command
# goes on after anything, on another machine too.
set -euo pipefail
part=${2:?lr, runs or direct is expected behind the folder}
COMMIT=6e80f992d2483818a0341855d946e15fc20ae834
[ "$part" != lr ] || COMMIT=6c97d3d0dd63b2a6ba559b4c4c1a0595b6ea5191
WORK=${WORK:-$HOME/smallbatch-$part}
HERE=$(cd "$(dirname "$0")" && pwd)
images=$(realpath "$1")

[ -d "$WORK" ] || git -C "$HERE" worktree add --detach "$WORK" "$COMMIT"
cd "$WORK"
make setup
ln -sfn "$images" cifar10
mkdir -p "runs/$part" "$HERE/$part"
cp -rn "$HERE/$part/." "runs/$part"

# Linux shares the cores among sessions before it looks at niceness: the whole session steps back.
[ ! -w /proc/self/autogroup ] || echo 19 > /proc/self/autogroup

keep() {  # what is finished, without checkpoints and events
    local run to
    for run in runs/"$part"/*/; do
        to=$HERE/$part/$(basename "$run")
        [ -f "$run/result.json" ] && [ ! -f "$to/result.json" ] || continue
        mkdir -p "$to"
        cp -r "$run/.hydra" "$run/metrics.csv" "$run/result.json" "$to"
        sed -i "s|$WORK|.|g" "$to/.hydra/hydra.yaml"  # no machine's folders
    done
}
( while sleep 60; do keep; done ) &
watcher=$!
trap 'kill $watcher; keep' EXIT

train() {  # overrides of one run; two at a time, from the queue of all lines
    nice -n 19 .venv/bin/python train.py experiment=cifar10_cpu study="$part" data.root=cifar10 "$@"
}
export -f train
export part
queue() { xargs -P 2 -I {} bash -c 'train {}'; }

case $part in
lr)  # the rate of each, and how many channels a group should keep in such narrow layers
    for norm in norm=bn norm=bcn norm=mabn norm=pws norm=brn_short \
        "norm=gn norm.channels_per_group="{2,4,8} "norm=ws_gn norm.channels_per_group="{2,4,8}; do
        printf "$norm recipe.lr=%s\n" 0.05 0.1 0.2 0.4
    done | sed 's/$/ data.holdout=0.1 data.train_fraction=0.2 recipe.epochs=10 batch=32 seed=0/' | queue
    ;;
runs)  # each scheme at the rate that did best in lr
    every() { printf "norm=%s recipe.lr=0.2 batch=$1 seed=$2\n" bn bcn mabn; }
    free() {
        echo "norm=gn recipe.lr=0.4 norm.channels_per_group=2 batch=32 seed=$1"
        echo "norm=ws_gn recipe.lr=0.1 norm.channels_per_group=8 batch=32 seed=$1"
        echo "norm=pws recipe.lr=0.1 batch=32 seed=$1"
    }
    {
        for seed in 0 1; do every 2 $seed; free $seed; every 32 $seed; every 8 $seed; done
        every 4 0; every 4 1
        every 2 2; free 2; every 32 2; every 8 2; every 4 2
        printf 'norm=brn_short recipe.lr=0.2 seed=%s batch=%s\n' {0..2}\ {2,8,32,4}
    } | queue
    ;;
direct)  # by the linear rule, and at a third of it
    for norm in "bn 0.2 0.067" "bcn 0.2 0.067" "mabn 0.2 0.067" "pws 0.1 0.033" \
        "gn 0.4 0.133" "ws_gn 0.1 0.033"; do
        set -- $norm
        printf "norm=$1 recipe.lr=%s protocol=direct batch=2 seed=0 recipe.epochs=3\n" "$2" "$3"
    done | sed '/norm=gn/s/$/ norm.channels_per_group=2/; /norm=ws_gn/s/$/ norm.channels_per_group=8/' | queue
    ;;
*) echo "PART is lr, runs or direct, not $part" >&2; exit 2 ;;
esac
