#!/usr/bin/env bash
# What this folder holds, with the code of this checkout; what is finished is skipped:
#
#   bash results/family/study.sh FOLDER PART     FOLDER: CIFAR-10 as train/<class>/<image>, test/...
#
# PART is lr (the learning rates of the schemes whose rates ../cifar10/lr does not choose, by one
# epoch) or runs (the study). JOBS runs at a time; small files are kept here as each run ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
images=$(realpath "$1") part=$2 here=results/family
mkdir -p "$here/$part" "runs/family_$part"
cp -rn "$here/$part/." "runs/family_$part"

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

case $part in
lr)
    for rate in 0.1 0.2 0.4 0.05; do
        for norm in bn_init cbn mbn powernorm online mimicnorm xbn "nf recipe.clip=agc"; do
            echo "norm=$norm recipe.lr=$rate batch=32 data.holdout=0.1 recipe.epochs=1"
        done
    done
    ;;
runs)
    for batch in 2 32; do
        printf "norm=%s batch=$batch recipe.lr=0.2\n" bn bcn mabn brn_short
        printf "norm=%s batch=$batch recipe.lr=0.1\n" cbn online xbn
        printf "norm=%s batch=$batch recipe.lr=0.05\n" mbn powernorm mimicnorm
        echo "norm=bn_init batch=$batch recipe.lr=0.4"
        [ $batch = 2 ] || continue  # the others have no batch statistics
        echo "norm=gn recipe.lr=0.4 norm.channels_per_group=2 batch=32"
        echo "norm=ws_gn recipe.lr=0.1 norm.channels_per_group=8 batch=32"
        echo "norm=pws recipe.lr=0.1 batch=32"
        echo "norm=nf recipe.clip=agc recipe.lr=0.4 batch=32"
    done
    ;;
esac | xargs -P "${JOBS:-1}" -I {} bash -c 'train {}'
