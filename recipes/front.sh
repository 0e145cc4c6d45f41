#!/usr/bin/env bash
# Two rewards: PPO with several weights of kindness beside the demo's reward model, and the front of both.
#
#     make front           (or, with the packages installed: bash recipes/front.sh [output folder] [make demo's])
#
# Half of the prompts are sad messages. WEIGHTS are those of kindness; the reward model's is 1. After an interruption,
# run the same command again to continue: finished stages are skipped, an unfinished one resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/front}
demo=${2:-outputs/demo}

stage() {
    echo
    echo "=== $1"
    shift
    accelerate launch --config_file accelerate_config.yaml "$@"
}

models=("sft=$demo/sft")
for weight in ${WEIGHTS:-0 3 8 20}; do
    stage "PPO with $weight times kindness" recipes/ppo.py --model_name_or_path "$demo/sft" \
        --reward_model_path "$demo/reward" --reward_funcs rlhf.starter.kindness.kind --reward_weights 1 "$weight" \
        --dataset_config moods --save_total_limit 1 --output_dir "$out/ppo-$weight"
    models+=("kind_$weight=$out/ppo-$weight")
done
stage "Both rewards of held-out replies" \
    eval/front.py --models "${models[@]}" --dataset_config moods --output_dir "$out/both"
echo
echo "Front: $out/both/front.png    Numbers: $out/both/front.json    Report: $out/both/report.html"
