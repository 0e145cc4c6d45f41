#!/usr/bin/env bash
# The road before RLHF at small scale: tokenizer -> pretraining (four objectives) -> fine-tuning -> in-context learning
# -> instruction tuning -> scaling laws -> RLOO beside PPO -> STaR, on one page.
#
#     make road            (or, with the packages installed: bash recipes/road.sh)
#
# Each stage reads recipes/configs/<stage>.yaml. After an interruption, run the same command again to continue: finished
# stages are skipped, an unfinished one resumes.
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

runs=()
finetune() {
    name=$1
    shift
    for seed in 1 2 3; do
        stage "3/8 Fine-tuning on 300 labelled sentences: $name, seed $seed" \
            recipes/finetune.py --config recipes/configs/finetune_small.yaml --model_name_or_path "$out/pretrain" \
            --seed "$seed" --output_dir "$out/finetune/$name-$seed" "$@"
        runs+=("$name=$out/finetune/$name-$seed")
    done
}
finetune scratch --from_scratch true
finetune frozen --freeze_body true --learning_rate 1e-2
finetune lora --use_peft true --learning_rate 2e-3
finetune full
finetune full_lambda --lm_coef 0.5
stage "3/8 Transfer: what pretraining is worth" \
    eval/transfer.py --models "${runs[@]}" --output_dir "$out/transfer"

stage "4/8 In-context learning: accuracy with 0, 1, 4 and 8 examples in the prompt" \
    eval/in_context.py --output_dir "$out/in-context"

zero_shot=(eval/in_context.py --tasks addition subtraction larger_number --num_fewshot 0 --limit 200
    --num_templates 10 --include_options true --apply_chat_template true)
stage "5/8 Instruction tuning: the arithmetic cluster before" "${zero_shot[@]}" --output_dir "$out/zero-shot"
stage "5/8 Instruction tuning: instructions of the other clusters" \
    recipes/instructions.py --held_out_clusters arithmetic --output_dir "$out/instructions"
stage "5/8 Instruction tuning: training on them" \
    recipes/sft.py --dataset_name "$out/instructions" --output_dir "$out/instruction-tuned"
stage "5/8 Instruction tuning: the arithmetic cluster after" "${zero_shot[@]}" \
    --model_name_or_path "$out/instruction-tuned" --baseline_dir "$out/zero-shot" \
    --output_dir "$out/zero-shot-tuned"

stage "6/8 Scaling laws: a tokenizer for small models" \
    recipes/tokenizer.py --vocab_size 512 --extra_ids 0 --output_dir "$out/tokenizer-512"
stage "6/8 Scaling laws: sizes and budgets, a fit, a forecast, an LSTM" \
    recipes/scaling.py --tokenizer_name "$out/tokenizer-512" --output_dir "$out/scaling"

stage "7/8 RLOO on the starter's score" recipes/rloo.py --output_dir "$out/rloo"
stage "7/8 PPO on the same score" recipes/ppo.py --total_episodes 640 --output_dir "$out/ppo"
stage "7/8 RLOO and PPO in one picture" \
    eval/curves.py --models "ppo=$out/ppo" "rloo=$out/rloo" --output_dir "$out/curves"
stage "7/8 RLOO and PPO on held-out prompts" \
    eval/compare.py --models base=starter "ppo=$out/ppo" "rloo=$out/rloo" --reference base --best_of_n 1 \
    --output_dir "$out/comparison"

stage "8/8 STaR: learning from its own right solutions" recipes/star.py --output_dir "$out/star"

python eval/report.py --output_dir "$out" >/dev/null
echo
echo "Report: $out/report.html"
