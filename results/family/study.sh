#!/usr/bin/env bash
# What this folder holds, with the code of this checkout; what is finished is skipped:
#
#   bash results/family/study.sh FOLDER lr|runs     FOLDER: CIFAR-10 as train/<class>/<image>, test/...
#
# lr: the learning rates of the schemes whose rates ../cifar10/lr does not choose, by one epoch; runs:
# the study.
# One run at a time and core; JOBS=2 for two. Small files are kept here as each run ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
images=$(realpath "$1") part=$2 here=results/family

train() {
    python train.py experiment=family "study=family_$part" "data.root=$images" seed=0 \
        recipe.eval_every=3 "$@" || true
    for run in runs/family_"$part"/*/; do
        to=$here/$part/$(basename "$run")
        [ -f "$run/result.json" ] && [ ! -f "$to/result.json" ] || continue
        mkdir -p "$to"
        cp -r "$run/.hydra" "$run/metrics.csv" "$run/result.json" "$to"
        sed -i "s|$PWD|.|g; s|$images|cifar10|g" "$to"/.hydra/*.yaml  # no machine's folders
    done
}
export -f train
export part images here
queue() { xargs -P "${JOBS:-1}" -I {} bash -c 'train {}'; }

case $part in
lr)
    for norm in bn_init cbn mbn powernorm online mimicnorm xbn "nf recipe.clip=agc"; do
        printf "norm=$norm recipe.lr=%s batch=32 data.holdout=0.1 recipe.epochs=1\n" 0.1 0.2 0.4
    done
    ;;
runs)
    cat "$here/runs.txt"
    ;;
esac | queue
