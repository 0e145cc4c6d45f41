#!/usr/bin/env bash
# The road before RLHF at small scale: tokenizer -> pretraining (four objectives) -> fine-tuning -> in-context learning
# -> instruction tuning -> scaling laws -> RLOO beside PPO -> STaR, on one page.
#
#     make road            (or, with the packages installed: bash recipes/road.sh)
#
# Each stage reads recipes/configs/<stage>.yaml. Run it again after an interruption: a finished stage says so and is
# skipped, an unfinished one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/road}

stage() {
    echo
    echo "=== $1"
    shift
    accelerate launch --config_file accelerate_config.yaml "$@"
}

stage "1/8 Tokenizer: byte-pair encoding of the starter conversations" \
    recipes/tokenizer.py --output_dir "$out/tokenizer"

stage "2/8 Pretraining: the next token (GPT), ten minutes" \
    recipes/pretrain.py --tokenizer_name "$out/tokenizer" --output_dir "$out/pretrain"
for objective in masked replaced span; do
    stage "2/8 Pretraining: $objective tokens" recipes/pretrain.py --config "recipes/configs/pretrain_$objective.yaml" \
        --tokenizer_name "$out/tokenizer" --output_dir "$out/pretrain-$objective"
done
stage "2/8 Compression: bits per byte beside xz and a 3-gram model" \
    eval/compression.py --models "pretrained=$out/pretrain" starter=starter --output_dir "$out/compression"

