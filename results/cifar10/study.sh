#!/usr/bin/env bash
# The study of this folder, in the order in which it is worth most whenever it has to stop:
#
#   bash results/cifar10/study.sh FOLDER      FOLDER: CIFAR-10 as train/<class>/<image>, test/...
#
# It trains with the code of COMMIT, in a worktree of it at WORK, two runs at a time at low priority.
# What is finished is copied here (lr/, runs/: all but checkpoints and events) as soon as it is, and
# put back first, so the same command goes on after anything, on another machine too.
set -euo pipefail
COMMIT=6c97d3d0dd63b2a6ba559b4c4c1a0595b6ea5191
WORK=${WORK:-$HOME/smallbatch}
HERE=$(cd "$(dirname "$0")" && pwd)
images=$(realpath "$1")

[ -d "$WORK" ] || git -C "$HERE" worktree add --detach "$WORK" "$COMMIT"
cd "$WORK"
make setup
ln -sfn "$images" cifar10
mkdir -p runs/cifar10_cpu_lr runs/cifar10_cpu
[ ! -d "$HERE/lr" ] || cp -rn "$HERE/lr/." runs/cifar10_cpu_lr
[ ! -d "$HERE/runs" ] || cp -rn "$HERE/runs/." runs/cifar10_cpu

keep() {  # what is finished, without checkpoints and events
    local study=$1 to=$2 run
    for run in runs/"$study"/*/; do
        [ -f "$run/result.json" ] || continue
        [ ! -f "$to/$(basename "$run")/result.json" ] || continue
        mkdir -p "$to/$(basename "$run")"
        cp -r "$run/.hydra" "$run/metrics.csv" "$run/result.json" "$to/$(basename "$run")"
        sed -i "s|$WORK|.|g" "$to/$(basename "$run")/.hydra/hydra.yaml"  # no machine's folders
    done
}
keep_all() { keep cifar10_cpu_lr "$HERE/lr"; keep cifar10_cpu "$HERE/runs"; }
( while sleep 60; do keep_all; done ) &
watcher=$!
trap 'kill $watcher; keep_all' EXIT

train() {
    nice -n 19 .venv/bin/python train.py -m experiment=cifar10_cpu data.root=cifar10 \
        hydra.launcher.workers=2 hydra.launcher.threads=1 "$@"
}
choose() {
    train study=cifar10_cpu_lr data.holdout=0.1 data.train_fraction=0.2 recipe.epochs=10 \
        batch=32 seed=0 recipe.lr=0.05,0.1,0.2,0.4 "$@"
}

# The learning rate of each, and how many channels a group should keep in such narrow layers.
choose norm=bn,bcn,mabn,pws
choose norm=gn,ws_gn norm.channels_per_group=2,4,8
choose norm=brn_short

# The study, each scheme at the learning rate that did best above: a table whenever it has to stop.
study() { train study=cifar10_cpu "$@"; }
study norm=bn,bcn,mabn recipe.lr=0.2 seed=0 batch=2,8,32
study norm=pws recipe.lr=0.1 seed=0 batch=32
study norm=gn recipe.lr=0.4 norm.channels_per_group=2 seed=0 batch=32
study norm=ws_gn recipe.lr=0.1 norm.channels_per_group=8 seed=0 batch=32
study norm=bn,bcn,mabn recipe.lr=0.2 seed=1 batch=2,8,32
study norm=pws recipe.lr=0.1 seed=1 batch=32
study norm=gn recipe.lr=0.4 norm.channels_per_group=2 seed=1 batch=32
study norm=ws_gn recipe.lr=0.1 norm.channels_per_group=8 seed=1 batch=32
study norm=bn,bcn,mabn recipe.lr=0.2 seed=0,1 batch=4
study norm=bn,bcn,mabn recipe.lr=0.2 seed=2 batch=2,8,32,4
study norm=pws recipe.lr=0.1 seed=2 batch=32
study norm=gn recipe.lr=0.4 norm.channels_per_group=2 seed=2 batch=32
study norm=ws_gn recipe.lr=0.1 norm.channels_per_group=8 seed=2 batch=32
study norm=brn_short recipe.lr=0.2 seed=0,1,2 batch=2,8,32,4
