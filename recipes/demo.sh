#!/usr/bin/env bash
# The whole road on the starter: base -> SFT -> preferences -> reward model -> PPO -> evaluation.
#
#     make demo            (or, with the packages installed: bash recipes/demo.sh)
#
# Each stage reads recipes/configs/<stage>.yaml and hands its folder to the next. Run it again after an interruption:
# a finished stage says so and is skipped, an unfinished one goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/demo}

stage() {
    echo
    echo "=== $1"
    shift
    accelerate launch --config_file accelerate_config.yaml "$@"
}

stage "1/5 Supervised fine-tuning: reply as people do" \
    recipes/sft.py --output_dir "$out/sft"
stage "2/5 Preferences: two replies per prompt, compared by a simulated labeler who likes upbeat ones" \
    recipes/collect.py --model_name_or_path "$out/sft" --output_dir "$out/preferences"
stage "3/5 Reward model: predict which reply the labeler prefers" \
    recipes/reward.py --model_name_or_path "$out/sft" --dataset_name "$out/preferences" --output_dir "$out/reward"
stage "4/5 PPO: raise the reward without leaving the SFT model far behind" \
    recipes/ppo.py --model_name_or_path "$out/sft" --reward_model_path "$out/reward" --output_dir "$out/ppo"
stage "5/5 Evaluation on prompts that no stage has seen" \
    eval/compare.py --models base=starter "sft=$out/sft" "ppo=$out/ppo" --reward_model_path "$out/reward" \
    --output_dir "$out/comparison"
cp "$out/comparison/results.json" "$out/results.json"
echo
echo "Results: $out/results.json    Replies: $out/comparison/samples.jsonl    Models: $out/sft, $out/ppo"
