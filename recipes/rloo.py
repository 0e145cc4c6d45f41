"""RLOO: policy gradients without a value function; the other completions of a prompt are the baseline.

    accelerate launch recipes/rloo.py
    accelerate launch recipes/rloo.py --model_name_or_path outputs/sft --reward_model_path outputs/reward
    accelerate launch recipes/rloo.py --reward_funcs my_rewards.politeness outputs/reward --reward_weights 0.5 1
    accelerate launch recipes/rloo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback-prompt --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --max_completion_length 256 --output_dir outputs/qwen-rloo

Without arguments it reads recipes/configs/rloo.yaml: the starter model, its prompts, and its scorer as the reward, as
in recipes/ppo.py, so that the two can be compared (eval/curves.py). If the model is an adapter, the policy starts as a
copy of it and the frozen adapter is the reference. Every flag of TRL's RLOOConfig and ModelConfig works.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from trl import ModelConfig

from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import prompt_rows
from rlhf.engines.completions import make_sampler
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards import load_reward, resolve_rewards
from rlhf.rloo import RLOOConfig, RLOOTrainer, need_prompts
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run

MEASURED = {
    "eval_reward": "reward",
    "eval_objective/kl": "KL to the reference",
    "eval_completions/mean_length": "length",
}


def main() -> None:
    # Arguments
    script_args, training_args, model_args = parse(__file__, DatasetArguments, RLOOConfig, ModelConfig)
    push = take_push_request(training_args)

    # Data
    train, test = load_splits(script_args, "ppo")

    # Tokenizer
    trust = training_args.trust_remote_code
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    reward_sources = resolve_rewards(training_args, source.base, train.column_names)
    tokenizer = load_tokenizer(source)
    sizes = (training_args.max_completion_length, context_length(source))
    train = prompt_rows(train, script_args.dataset_name, tokenizer, *sizes).remove_columns("input_ids")
    test = prompt_rows(test, script_args.dataset_name, tokenizer, *sizes).remove_columns("input_ids")
    need_prompts(train, script_args.dataset_name, training_args)
    make_sampler(training_args, training_args.output_dir, [source], trains=True)  # waits for a server
    if not start_run(__file__, training_args.output_dir, script_args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)

    # Model
    policy = load_causal_lm(source, model_args, tokenizer)
    size = training_args.per_device_eval_batch_size
    rewards = [load_reward(found, model_args, policy=policy, batch_size=size) for found in reward_sources]

    # Trainer
    trainer = RLOOTrainer(
        model=policy,
        args=training_args,
        reward_funcs=rewards,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
    )

    # Train
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    eval_metrics = trainer.evaluate()
    metrics = {key: eval_metrics[key] for key in MEASURED if key in eval_metrics}
    trainer.log_metrics("eval", metrics)

    # Save, report, card, push
    trainer.save_model()
    trainer.save_state()
    write_report(training_args.output_dir, metrics)
    write_card(
        training_args.output_dir,
        __file__,
        [script_args, training_args, model_args],
        source=source,
        rewards=reward_sources,
        datasets=[script_args.dataset_name],
        metrics={f"held-out {MEASURED[key]}": value for key, value in metrics.items()},
        repo_id=push and push.repo_id,
    )
    finish_run(training_args.output_dir, metrics)
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
