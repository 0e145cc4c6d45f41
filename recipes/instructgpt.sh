#!/usr/bin/env bash
# InstructGPT's first figure and its alignment tax, in small: for models of three sizes the base, the base with the best
# of ten few-shot prompts, SFT, PPO, PPO-ptx and best-of-n; win rates, ratings, and what PPO costs.
#
#     make instructgpt     (or, with the packages installed: bash recipes/instructgpt.sh [output folder] [make demo's])
#
# The second folder is that of a finished `make demo`: its SFT and reward model are used in place of new ones. SEEDS and
# PTX_COEFS say how much is run, for example SEEDS="1" PTX_COEFS="1" make instructgpt; every size has the first
# coefficient, the starter has all. After an interruption, run the same command again to continue: finished stages are
# skipped, an unfinished one resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/instructgpt}
demo=${2:-}
seeds=${SEEDS:-1 2 3}
ptx_coefs=${PTX_COEFS:-1 0.1 10}
ptx_coef=${ptx_coefs%% *}

stage() {
    echo
    echo "=== $1"
    shift
    accelerate launch --config_file accelerate_config.yaml "$@"
}

# all that follows SFT, for one size: its name, its base, its SFT model, and its coefficients of PPO-ptx
align() {
    local size=$1 base=$2 sft=$3 models seed coef pair episodes=640
    # the value function starts as the reward model only on its own base, the starter, which needs fewer updates
    if [[ $size == starter ]]; then episodes=384; fi
    shift 3
    models=("base=$base" "prompted=$base" "sft=$sft")
    stage "$size: the best of ten few-shot prompts for the base" \
        eval/few_shot.py --model_name_or_path "$base" --output_dir "$out/$size/few-shot"
    for seed in $seeds; do
        stage "$size: PPO, seed $seed" recipes/ppo.py --model_name_or_path "$sft" --reward_model_path "$reward" \
            --seed "$seed" --total_episodes "$episodes" --save_total_limit 1 --output_dir "$out/$size/ppo-$seed"
        models+=("ppo-$seed=$out/$size/ppo-$seed")
        for coef in "$@"; do
            stage "$size: PPO-ptx with a coefficient of $coef, seed $seed" \
                recipes/ppo.py --model_name_or_path "$sft" --reward_model_path "$reward" --ptx_coef "$coef" \
                --ptx_dataset_name starter --seed "$seed" --total_episodes "$episodes" --save_total_limit 1 \
                --output_dir "$out/$size/ppo-ptx-$coef-$seed"
            models+=("ppo-ptx-$coef-$seed=$out/$size/ppo-ptx-$coef-$seed")
        done
    done
    stage "$size: replies to held-out prompts, judged by the gold score and rated by simulated people" \
        eval/compare.py --models "${models[@]}" --few_shot "prompted=$out/$size/few-shot/prompt.json" \
        --reward_model_path "$reward" --judges gold simulated --output_dir "$out/$size/comparison"
    for pair in "${models[@]}"; do
        [[ $pair == prompted=* ]] && continue # its weights are those of the base
        stage "$size: sixteen tasks in context, ${pair%%=*}" eval/in_context.py --model_name_or_path "${pair#*=}" \
            --num_fewshot 4 --output_dir "$out/$size/in-context/${pair%%=*}"
    done
    comparisons+=("$size=$out/$size/comparison")
}

if [[ -n $demo ]]; then
    sft=$demo/sft reward=$demo/reward
else
    sft=$out/starter/sft reward=$out/starter/reward
    stage "starter: supervised fine-tuning" recipes/sft.py --output_dir "$sft"
    stage "starter: preferences" recipes/collect.py --model_name_or_path "$sft" --output_dir "$out/starter/preferences"
    stage "starter: the reward model of all sizes" recipes/reward.py --model_name_or_path "$sft" \
        --dataset_name "$out/starter/preferences" --output_dir "$reward"
fi

comparisons=()
stage "Tokenizer of the small models" recipes/tokenizer.py --output_dir "$out/tokenizer"
small() {
    local size=$1
    shift
    stage "$size: pretraining" \
        recipes/pretrain.py --tokenizer_name "$out/tokenizer" --output_dir "$out/$size/base" "$@"
    stage "$size: supervised fine-tuning" \
        recipes/sft.py --model_name_or_path "$out/$size/base" --output_dir "$out/$size/sft"
    align "$size" "$out/$size/base" "$out/$size/sft" "$ptx_coef"
}
small small
small medium --hidden_size 384 --num_hidden_layers 6 --num_attention_heads 6 --intermediate_size 1056
# shellcheck disable=SC2086
align starter starter "$sft" $ptx_coefs

stage "The figure and the alignment tax" \
    eval/instructgpt.py --comparisons "${comparisons[@]}" --ptx_coef "$ptx_coef" --output_dir "$out/figure"
python eval/report.py --output_dir "$out" >/dev/null
echo
echo "Figure: $out/figure/instructgpt.png and tax.png    Numbers: $out/figure/instructgpt.json"
echo "Report: $out/report.html"
