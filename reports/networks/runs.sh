#!/usr/bin/env bash
# Makes the runs of this folder's tables, of ../gallery and of README.md: bash reports/networks/runs.sh OUT [NAME ...]
#
# $QVW_CIFAR10 is a folder with train/CLASS/* and val/CLASS/*, $QVW_MODELS one with models.py and weights/,
# $QVW_IMAGENET a CSV index of photographs. Interrupted, it goes on where it was; two hours on two cores.
set -euo pipefail
out=$1
shift
qvw() { python -m analysis "$@"; }
asked() { [[ $# -eq 1 || " ${*:2} " == *" $1 "* ]]; }

# NAME, images of the sweep, images of --verify, then the options that name the network and its images
network() {
    local name=$1 images=$2 verify=$3 run=$out/$1
    shift 3
    [[ -e $run/.done ]] && return
    qvw stats "$@" --run "$run" --images "$images"
    qvw sensitivity "$@" --run "$run" --images "$images" --bits 2,3,4,6,8 --bn re-estimate --proxies
    qvw sensitivity "$@" --run "$run" --images "$images" --bits 2,3,4 --bn re-estimate \
        --protocol leave_one_out --groups kind
    for like in w3a4 w4a4 w4a8; do
        [[ -e $run/plan-$like/verification.parquet ]] ||
            qvw plan --run "$run" --like $like --verify --images "$verify" --batch-size 125 --out "$run/plan-$like.json"
    done
    [[ -e $run/verification.parquet ]] ||
        qvw plan --run "$run" --like w3a3 --pareto --verify --images "$verify" --batch-size 125
    qvw report "$run" --out "$run/report"
    touch "$run/.done"
}

cifar() {
    local name=$1
    shift
    network "$name" 1000 2500 "$QVW_MODELS/models.py:$name" --weights "$QVW_MODELS/weights/$name.safetensors" \
        --data "folder:$QVW_CIFAR10" --input-size 3,32,32 "$@"
}
tokens=(--mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616)

asked cifar10_vit_d128_l4 "$@" && cifar cifar10_vit_d128_l4 "${tokens[@]}"
asked cifar10_swin_e48 "$@" && cifar cifar10_swin_e48 "${tokens[@]}"
asked cifar10_resnet20 "$@" &&
    cifar cifar10_resnet20 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --exclude '*downsample*'
asked imagenet_mobilenetv1_025 "$@" &&
    network imagenet_mobilenetv1_025 200 500 "$QVW_MODELS/models.py:imagenet_mobilenetv1_025" \
        --weights "$QVW_MODELS/weights/imagenet_mobilenetv1_025.safetensors" --data "csv:$QVW_IMAGENET" \
        --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --input-size 3,224,224

# The layout of figures at the sizes of real networks; untrained, so that the numbers say nothing.
for name in resnet50 swin_tiny_patch4_window7_224; do
    if asked $name "$@" && [[ ! -e $out/$name/.done ]]; then
        qvw stats $name --data "csv:$QVW_IMAGENET" --run "$out/$name" --images 8
        qvw sensitivity --run "$out/$name" --images 8 --bits 2,4,8 --bn stored
        qvw plan --run "$out/$name" --like w4a4
        touch "$out/$name/.done"
    fi
done

[[ $# -gt 0 ]] || qvw compare "$out/cifar10_resnet20" "$out/cifar10_vit_d128_l4" "$out/cifar10_swin_e48" --out "$out/compare"
