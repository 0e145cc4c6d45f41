#!/usr/bin/env bash
# RLHF on the starter: base -> SFT -> preferences -> reward model -> PPO -> evaluation -> report.
#
#     make demo            (or, with the packages installed: bash recipes/demo.sh)
#
# Each stage reads recipes/configs/<stage>.yaml and hands its folder to the next. After an interruption, run the same
# command again to continue: finished stages are skipped, an unfinished one resumes from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/demo}

stage() {
    echo
    echo "=== $1"
    shift
    accelerate launch --config_file accelerate_config.yaml "$@"
}

stage "1/6 Supervised fine-tuning: reply as people do" \
    recipes/sft.py --output_dir "$out/sft"
stage "2/6 Preferences: two replies per prompt, compared by a simulated labeler who likes upbeat ones" \
    recipes/collect.py --model_name_or_path "$out/sft" --output_dir "$out/preferences"
stage "3/6 Reward model: predict which reply the labeler prefers" \
    recipes/reward.py --model_name_or_path "$out/sft" --dataset_name "$out/preferences" --output_dir "$out/reward"
stage "4/6 PPO: raise the reward and stay near the SFT model" \
    recipes/ppo.py --model_name_or_path "$out/sft" --reward_model_path "$out/reward" --output_dir "$out/ppo"
stage "5/6 Evaluation on prompts that no stage has seen" \
    eval/compare.py --models base=starter "sft=$out/sft" "ppo=$out/ppo" --reward_model_path "$out/reward" \
    --output_dir "$out/comparison"
stage "6/6 Over-optimization: where the reward model and the true score part, and which checkpoint to keep" \
    eval/overoptimization.py --model_name_or_path "$out/ppo" --max_prompts 104 --output_dir "$out/overoptimization"
cp "$out/comparison/results.json" "$out/results.json"
python eval/report.py --output_dir "$out" >/dev/null
echo
echo "Results: $out/results.json    Replies: $out/comparison/samples.jsonl    Models: $out/sft, $out/ppo"
echo "Report:  $out/report.html"
