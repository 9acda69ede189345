#!/usr/bin/env bash
# The rows of the README's tables:  bash results/reproduce.sh DATA_DIR
# A finished row is skipped; a broken-off one is resumed. Rows end up in runs/results/<variant>.
set -eu
cd "$(dirname "$0")/.."
data="${1:?give the folder with the real data}"

row() {   # script, data set, variant, flags
    local out="runs/results/$3" script="$1" dataset="$2"
    shift 3
    local folder="$out/$script/$dataset/0" resume=()
    [ -e "$folder/result.json" ] && { echo "done: $folder"; return; }
    [ -e "$folder/checkpoint.pt" ] && resume=(--resume)
    python "$script.py" --dataset "$dataset" --out_dir "$out" "$@" "${resume[@]+"${resume[@]}"}"
}

row jnf synth_mnist_svhn default
row jnf mnist_svhn 3000-steps --data_dir "$data" --max_steps 3000
row jnf mnist_svhn contrastive-3000-steps --data_dir "$data" --max_steps 3000 --shared contrastive
row jnf mnist_svhn gaussian-3000-steps --data_dir "$data" --max_steps 3000 --flow_blocks 0
row jnf synth_polymnist three-modalities
row jnf shapes default
