"""PPO: train a language model to a higher reward, with a penalty on the KL to the SFT model.

    accelerate launch recipes/ppo.py
    accelerate launch recipes/ppo.py --model_name_or_path outputs/sft --reward_model_path outputs/reward
    accelerate launch recipes/ppo.py --reward_funcs my_rewards.politeness outputs/reward --reward_weights 0.5 1
    accelerate launch recipes/ppo.py --reward_model_path outputs/reward-1 outputs/reward-2 --reward_ensemble wco
    accelerate launch recipes/ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback-prompt --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \
        --response_length 256 --output_dir outputs/qwen-ppo

Without arguments it reads recipes/configs/ppo.yaml: the starter model, its prompts, and its scorer as the reward. If
the model is an adapter, the policy starts as a copy of it and the frozen adapter is the reference. Reward adapters of
the same base join them, so that all share one base in memory. Several reward models are an ensemble. Every flag of
PPOConfig (rlhf/ppo/config.py) and ModelConfig works.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from trl import ModelConfig

from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import language_model_rows, prompt_rows
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.models.adapters import REFERENCE
from rlhf.models.loading import load_policy
from rlhf.models.sources import base_config, context_length, resolve, resolve_start
from rlhf.models.tokenizers import load_tokenizer
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.ppo_plan import plan_ppo
from rlhf.planning.report import print_plan
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.ppo.config import check_stop_tokens
from rlhf.ppo.engine import need_engine
from rlhf.ppo.setup import check_ptx_flags
from rlhf.rewards import load_reward, load_rewards, resolve_reward_functions, resolve_rewards
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run

MEASURED = ("objective/raw_scores", "objective/kl", "completions/mean_length")


def main() -> None:
    # Arguments
    script_args, training_args, model_args, plan = parse(__file__, DatasetArguments, PPOConfig, ModelConfig, PlanConfig)
    check_ptx_flags(training_args)
    push = take_push_request(training_args)

    # Data
    train, test = load_splits(script_args, "ppo")

    # Tokenizer
    name, revision, sft = model_args.model_name_or_path, model_args.model_revision, training_args.sft_model_path
    trust = {"trust_remote_code": training_args.trust_remote_code}
    source = resolve(sft, "--sft_model_path", **trust) if sft else resolve(name, revision=revision, **trust)
    start = resolve_start(name, source, revision) if sft else source
    reward_sources = resolve_rewards(training_args, source.base, train.column_names)
    eval_sources = resolve_reward_functions(
        training_args.eval_reward_funcs, "--eval_reward_funcs", columns=test.column_names, judge=training_args, **trust
    )
    tokenizer = load_tokenizer(source)
    check_stop_tokens(training_args, tokenizer)
    sizes = (training_args.response_length, context_length(source))
    train, test = (prompt_rows(split, script_args.dataset_name, tokenizer, *sizes) for split in (train, test))
    ptx = language_model_rows(training_args.ptx_dataset_name, tokenizer, context_length(source))
    if plan.plan:
        both = (reward_sources, eval_sources)
        return print_plan(plan_ppo(plan, training_args, model_args, (source, start), both, train))
    need_engine(training_args, base_config(source), model_args.use_peft or start.adapter is not None)
    if not start_run(__file__, training_args.output_dir, script_args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)

    # Model
    policy = load_policy(source, model_args, tokenizer, start=start)
    size = training_args.per_device_eval_batch_size
    rewards = load_rewards(reward_sources, training_args, model_args, policy=policy, batch_size=size)
    eval_rewards = [load_reward(found, model_args, policy=policy, batch_size=size) for found in eval_sources]
    if source.adapter is not None:
        training_args.ref_adapter_name = REFERENCE

    # Trainer
    trainer = PPOTrainer(
        model=policy, args=training_args, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
        reward_funcs=rewards, eval_reward_funcs=eval_rewards, ptx_dataset=ptx,
    )  # fmt: skip

    # Train
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    metrics = {key: trainer.last_metrics[key] for key in MEASURED}

    # Save, report, card, push
    trainer.save_model()
    trainer.save_state()
    write_report(training_args.output_dir, metrics)
    write_card(
        training_args.output_dir, __file__, [script_args, training_args, model_args], source=start,
        rewards=reward_sources, datasets=[script_args.dataset_name], repo_id=push and push.repo_id,
        metrics={f"{name} (last batch of training)": value for name, value in metrics.items()},
    )  # fmt: skip
    finish_run(training_args.output_dir, metrics)
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
