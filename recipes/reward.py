"""Reward model: learn from comparisons which of two replies people prefer, with TRL's RewardTrainer.

    accelerate launch recipes/reward.py
    accelerate launch recipes/reward.py --model_name_or_path outputs/sft --dataset_name outputs/preferences
    accelerate launch recipes/reward.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir outputs/qwen-reward
    accelerate launch recipes/reward.py --dataset_name outputs/preferences my.jsonl --dataset_probs 0.7 0.3
    accelerate launch recipes/reward.py --use_peft false --learning_rate 1e-5 --output_dir outputs/reward-full

Without arguments it reads recipes/configs/reward.yaml: the starter model and pairs of human replies. If the model is an
adapter (the SFT adapter, for example), the reward adapter starts from its weights. An encoder such as BERT reads prompt
and reply as a pair. The task type is always SEQ_CLS, so that the score head is trained and saved. Every flag of TRL's
RewardConfig and ModelConfig works.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from trl import ModelConfig, RewardConfig, RewardTrainer

from eval.measuring.held_out import evaluate_reward_model
from eval.report import write_report
from rlhf.data.mixture import MixtureArguments, dataset_names, load_mixture, mix
from rlhf.data.pairs import PreferenceCollator
from rlhf.data.rendering import close_template
from rlhf.data.rows import preference_rows
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.models.loading import load_reward_model
from rlhf.models.sources import base_config, context_length, reads_pairs, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.report import print_plan
from rlhf.planning.supervised import plan_reward
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run
from rlhf.run.trainers import whole_checkpoints

MEASURED = {"accuracy": "mean", "margin": "margin", "calibration error": "calibration_error"}


def main() -> None:
    # Arguments
    script_args, training_args, model_args, plan = parse(
        __file__, MixtureArguments, RewardConfig, ModelConfig, PlanConfig
    )
    push = take_push_request(training_args)

    # Data
    found = load_mixture(script_args, "preference_pairs")

    # Tokenizer
    trust = training_args.trust_remote_code
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(
        source,
        eos_token=training_args.eos_token,
        pad_token=training_args.pad_token,
        chat_template_path=training_args.chat_template_path,
        classifier=True,
    )
    pairs = reads_pairs(tokenizer, base_config(source))
    limits = (training_args.max_length, training_args.dataset_num_proc, context_length(source), pairs)
    train, test = mix(script_args, found, lambda rows, name: preference_rows(rows, name, tokenizer, *limits))
    if plan.plan:
        return print_plan(plan_reward(plan, training_args, model_args, source, train))
    if not start_run(__file__, training_args.output_dir, script_args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)
    close_template(tokenizer)  # in what is saved: the score is read at the token that ends the reply

    # Model
    model = load_reward_model(source, model_args, tokenizer, seed=training_args.seed)

    # Trainer
    training_args.remove_unused_columns = False  # TRL doesn't know the columns of token types
    trainer = whole_checkpoints(RewardTrainer)(
        model=model, args=training_args, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
        data_collator=PreferenceCollator(tokenizer.pad_token_id, training_args.pad_to_multiple_of),
    )  # fmt: skip

    # Train
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    metrics = trainer.evaluate()
    accuracy = evaluate_reward_model(trainer, test)
    metrics |= {"eval_accuracy": accuracy["mean"], "eval_margin": accuracy["margin"]}
    trainer.log_metrics("eval", metrics)

    # Save, report, card, push
    trainer.save_model()
    trainer.save_state()
    write_report(training_args.output_dir, metrics)
    write_card(
        training_args.output_dir, __file__, [script_args, training_args, model_args], source=source,
        datasets=dataset_names(script_args), repo_id=push and push.repo_id,
        metrics={f"held-out {name}": accuracy[key] for name, key in MEASURED.items()},
    )  # fmt: skip
    finish_run(training_args.output_dir, metrics)
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
