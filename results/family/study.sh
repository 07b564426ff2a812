#!/usr/bin/env bash
# What this folder holds, with the code of this checkout and the `python` in the PATH; what is
# finished is skipped:
#
#   bash results/family/study.sh FOLDER PART     FOLDER: CIFAR-10 as train/<class>/<image>, test/...
#
# PART is lr (the learning rates of the schemes whose rates ../cifar10/lr does not choose, by one
# epoch), runs (the study) or evaluation (bn at 2 by all statistics, after runs and from its
# checkpoint). JOBS runs at a time; small files are kept here as each run ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
images=$(realpath "$1") part=${2:?lr, runs or evaluation is expected behind the folder} here=results/family

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

evaluate() {  # a line of evaluation.csv: on which images, by what, top-1
    local found
    found=$(mktemp)
    python scripts/evaluate.py "$2" $3 --json "$found" > /dev/null
    python -c "import json; print('$1,$3,%.2f' % json.load(open('$found'))['top1'])"
}
by_all_statistics() {
    local run held alpha
    python train.py experiment=family study=family_held "data.root=$images" seed=0 norm=bn batch=2 \
        recipe.lr=0.2 recipe.eval_every=3 data.holdout=0.1 > /dev/null
    held=$(echo runs/family_held/bn-b2-*) run=$(echo runs/family_runs/bn-b2-*)
    for alpha in 0.0 0.1 0.2 0.4 0.6; do evaluate held-out "$held" "evaluation.alpha=$alpha"; done
    for keys in evaluation.statistics=running evaluation.statistics=precise \
        "evaluation.statistics=batch evaluation.batch_size=2" \
        "evaluation.statistics=batch evaluation.batch_size=100" \
        evaluation.alpha={0.1,0.2,0.4,0.6}; do evaluate test "$run" "$keys"; done
}
if [ "$part" = evaluation ]; then
    by_all_statistics > $here/evaluation.csv
    exit
fi

mkdir -p "$here/$part" "runs/family_$part"
cp -rn "$here/$part/." "runs/family_$part"
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
