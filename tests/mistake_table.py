"""The wrong commands of tests/mistakes.py: what is wrong, what the one line must say, and the correction."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mistake_inputs import (
    FUNCTION,
    PPO,
    ROWS,
    SHORT,
    assistant,
    copy,
    folder_instead,
    halved,
    lines,
    of_nan,
    user,
    with_keys,
)

SFT = f"--model_name_or_path made/lm --dataset_name made/data/sft.jsonl {SHORT} --eval_on_start false"
SAMPLED = "--dtype float32 --max_new_tokens 4 --max_prompts 2 --per_device_eval_batch_size 4"
BASES = {
    "recipes/sft.py": SFT,
    "recipes/reward.py": f"--model_name_or_path made/lm --dataset_name made/data/pref.jsonl {SHORT}",
    "recipes/ppo.py": PPO.replace("--reward_funcs made_rewards.length", "--reward_funcs rewards.length"),
    "recipes/rloo.py": f"--model_name_or_path made/lm --dataset_name made/data/prompts.jsonl {SHORT} --max_steps 1 "
    "--gradient_accumulation_steps 1 --max_completion_length 4 --num_generations 4 --reward_funcs rewards.length",
    "recipes/collect.py": f"--model_name_or_path made/lm --dataset_name made/data/prompts.jsonl {SAMPLED} "
    "--labeler reward --reward_funcs rewards.length",
    "recipes/finetune.py": f"--model_name_or_path made/lm --dataset_name made/data/labelled.jsonl {SHORT}",
    "recipes/pretrain.py": "--tokenizer_name made/tok --dataset_name made/data/text.jsonl --hidden_size 16 "
    "--num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --block_size 32 --max_steps 1 --bf16 false",
    "recipes/tokenizer.py": "--dataset_name made/data/text.jsonl --vocab_size 300 --extra_ids 0",
    "recipes/scaling.py": "--dataset_name made/data/text.jsonl --tokenizer_name made/tok --hidden_sizes 8 12 16 "
    "--num_hidden_layers 1 1 1 --head_dim 4 --token_budgets 200 400 800 --forecast_hidden_size 24 "
    "--forecast_num_hidden_layers 1 --max_eval_tokens 500 --lstm_num_hidden_layers 0 --max_workers 1",
    "recipes/instructions.py": "--dataset_name starter --max_examples_per_task 4 --max_test_examples_per_task 4",
    "recipes/star.py": "--model_name_or_path made/lm --dataset_name made/data/problems.jsonl --dtype float32 "
    "--rounds 1 --max_new_tokens 4 --num_fewshot 1 --num_generations 1",
    "recipes/rounds.py": "--model_name_or_path made/sft --dataset_name made/data/prompts.jsonl --rounds 1",
    "recipes/chat.py": "--models a=made/lm b=made/sft --dtype float32 --max_new_tokens 4",
    "eval/compare.py": "--models sft=made/sft lm=made/lm --dataset_name made/data/prompts.jsonl --best_of_n 1 "
    f"{SAMPLED} --judges reward --reward_funcs rewards.length",
    "eval/few_shot.py": "--model_name_or_path made/lm --dataset_name made/data/sft.jsonl --reward_funcs rewards.length "
    f"--num_prompts 2 --num_fewshot 1 {SAMPLED}",
    "eval/front.py": "--models sft=made/sft lm=made/lm --dataset_name made/data/prompts.jsonl "
    f"--reward_funcs rewards.length starter {SAMPLED}",
    "eval/compression.py": "--models lm=made/lm --dataset_name made/data/text.jsonl --dtype float32 --max_texts 2",
    "eval/curves.py": "--models ppo=made/ppo",
    "eval/in_context.py": "--model_name_or_path made/lm --tasks sentiment --limit 4 --num_fewshot 0 --dtype float32",
    "eval/overoptimization.py": "--model_name_or_path made/ppo --dtype float32 --max_prompts 2 --best_of_n 2 "
    "--eval_reward_funcs rewards.length",
    "eval/report.py": "",
    "eval/transfer.py": "--models scratch=made/finetune",
    "eval/reward_bench.py": "--reward_model_path made/rm --dataset_name made/data/bench.jsonl --dtype float32",
}
BASES = {command: f"{words} --output_dir out" for command, words in BASES.items()}


@dataclass(frozen=True)
class Mistake:
    """A wrong command.

    Args:
        group: the kind of input that is wrong.
        command: the recipe; BASES has the words of a command that works.
        wrong: flags that replace or add to those words; `--flag -` leaves one out.
        says: what the line on standard error must contain.
        right: the flags of the corrected command.
        base: flags that both commands have.
        files: what is made in the case's folder, by name: text, bytes, or a function of the path.
        mend: what is made there before the corrected command.
        early: no file has to be read, so the answer takes no longer than a process needs to start.
        finish: the corrected command runs to its end, not only as far as its flags are read.
    """

    group: str
    name: str
    command: str
    wrong: str
    says: tuple[str, ...]
    right: str = ""
    base: str = ""
    files: Mapping[str, object] = field(default_factory=dict)
    mend: Mapping[str, object] = field(default_factory=dict)
    early: bool = False
    finish: bool = False


MISTAKES: list[Mistake] = []


def add(group: str, name: str, command: str, wrong: str, *says: str, **more: object) -> None:
    """Add a case; its folder has rewards.py."""
    files = {"rewards.py": FUNCTION, **more.pop("files", {})}  # type: ignore[dict-item]
    MISTAKES.append(Mistake(group, name, f"{command}.py", wrong, says, files=files, **more))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- numbers

NUMBERS = {
    "recipes/sft": "learning_rate=-1 learning_rate=nan learning_rate=1e30 per_device_train_batch_size=0 "
    "per_device_eval_batch_size=-2 gradient_accumulation_steps=0 num_train_epochs=-1 max_steps=-7 max_length=0 "
    "weight_decay=-0.1 adam_beta1=1 adam_beta2=1.5 adam_epsilon=-1 max_grad_norm=-1 warmup_steps=-3 seed=-1 "
    "seed=99999999999 data_seed=-4 save_total_limit=0 logging_steps=0 eval_steps=-5 save_steps=0 lora_r=0 "
    "lora_alpha=-8 lora_dropout=1 dataloader_num_workers=-1 label_smoothing_factor=2 dataset_num_proc=0 "
    "neftune_noise_alpha=inf pad_to_multiple_of=0",
    "recipes/reward": "per_device_train_batch_size=-3 learning_rate=inf max_length=-1 center_rewards_coefficient=-1 "
    "seed=4294967296 lora_dropout=nan dataset_probs=-1 dataset_probs=0",
    "recipes/ppo": "save_total_limit=-1 kl_coef=nan kl_coef=-1 gamma=7 lam=-1 cliprange=0 cliprange_value=-1 "
    "epsilon_high=0 vf_coef=nan num_ppo_epochs=0 num_mini_batches=0 response_length=0 temperature=0 temperature=nan "
    "total_episodes=0 "
    "total_episodes=-5 score_clip=0 length_penalty=-1 missing_eos_score=nan missing_eos_penalty=-1 "
    "adaptive_kl_target=-2 adaptive_kl_horizon=0 target_kl=0 value_warmup_steps=-1 entropy_coef=inf ptx_coef=-1 "
    "stop_token_id=-1 num_sample_generations=-1 uwo_coef=-1 local_rollout_forward_batch_size=0",
    "recipes/rloo": "num_generations=1 num_generations=0 beta=nan beta=-1 epsilon=0 top_p=0 top_p=1.5 top_k=-3 min_p=2 "
    "max_completion_length=0 num_iterations=0 steps_per_generation=0 num_generations_eval=0 repetition_penalty=0 "
    "ref_model_mixup_alpha=1.1 temperature=-1",
    "recipes/collect": "per_device_eval_batch_size=0 server_port=99999 server_port=0 num_generations=1 max_prompts=0 "
    "max_new_tokens=0 temperature=0 seed=-1 overlap=2 repeats=-0.1 labeler_temperature=nan",
    "recipes/finetune": "lm_coef=-1 max_length=4 max_train_samples=0 num_train_epochs=nan",
    "recipes/pretrain": "hidden_size=0 num_hidden_layers=-1 num_attention_heads=0 intermediate_size=0 dropout=1 "
    "block_size=4 mlm_probability=0 mean_noise_span_length=0.5 generator_hidden_size=1.5 disc_weight=-1 "
    "max_position_embeddings=0",
    "recipes/tokenizer": "min_frequency=-1 model_max_length=0 extra_ids=-1 vocab_size=0",
    "recipes/scaling": "max_workers=0 max_eval_tokens=0 head_dim=0 learning_rate=nan lstm_learning_rate=-1 seed=-1 "
    "forecast_hidden_size=0 lstm_num_hidden_layers=-1",
    "recipes/instructions": "max_examples_per_task=0 max_test_examples_per_task=-1 num_templates=0 seed=-1",
    "recipes/star": "rounds=0 num_generations=0 num_fewshot=-1 max_new_tokens=0 temperature=nan max_train_samples=0 "
    "max_eval_samples=0 per_device_eval_batch_size=0",
    "recipes/rounds": "rounds=0 seed=-1",
    "recipes/chat": "server_port=-1 max_new_tokens=0 temperature=0 seed=99999999999",
    "eval/few_shot": "num_prompts=0 num_fewshot=0 max_prompts=0 max_new_tokens=-1 temperature=nan seed=-1",
    "eval/compare": "per_device_eval_batch_size=0 max_prompts=-1 best_of_n=-1 temperature=inf max_new_tokens=0",
    "eval/front": "max_prompts=0 max_new_tokens=-1 temperature=nan per_device_eval_batch_size=0 seed=-1",
    "eval/compression": "ngram_order=0 max_texts=1 max_length=1 per_device_eval_batch_size=0",
    "eval/in_context": "limit=0 num_fewshot=-1 num_fewshot=201 num_templates=0 per_device_eval_batch_size=0",
    "eval/overoptimization": "max_prompts=-3 temperature=0 best_of_n=-1 reward_weights=nan",
    "eval/transfer": "seed=-1",
    "eval/reward_bench": "per_device_eval_batch_size=0",
}  # fmt: skip
for command, mistakes in NUMBERS.items():
    for mistake in mistakes.split():
        flag, value = mistake.split("=")
        add("numbers", f"{command} {mistake}", command, f"--{flag} {value}", f"--{flag} ", "must be", early=True)

# ---------------------------------------------------------------------------------------------- flags

for name, command, wrong, *says in (
    ("no number", "recipes/sft", "--learning_rate fast", "--learning_rate", "invalid float value: 'fast'"),
    ("a float for a whole number", "recipes/sft", "--max_steps 1.5", "--max_steps", "invalid int value: '1.5'"),
    ("no bool", "recipes/sft", "--use_peft perhaps", "--use_peft", "yes/no, true/false"),
    ("no value", "recipes/ppo", "--kl_coef", "--kl_coef", "expected one argument"),
    ("an unknown optimizer", "recipes/sft", "--optim best", "--optim", "invalid choice: 'best'", "adamw_torch"),
    ("an unknown schedule", "recipes/reward", "--lr_scheduler_type up", "invalid choice: 'up'", "cosine"),
    ("an unknown strategy", "recipes/sft", "--save_strategy often", "invalid choice: 'often'", "epoch"),
    ("an unknown dtype", "recipes/sft", "--dtype float31", "--dtype", "invalid choice: 'float31'", "bfloat16"),
    ("an unknown value function", "recipes/ppo", "--value_function tree", "invalid choice: 'tree'", "head"),
    ("an unknown log level", "recipes/sft", "--log_level loud", "invalid choice: 'loud'"),
    ("an unknown packing strategy", "recipes/sft", "--packing_strategy x", "invalid choice: 'x'", "bfd"),
    ("an unknown KL estimator", "recipes/ppo", "--kl_estimator k2", "invalid choice: 'k2'", "k1"),
    ("an unknown hub strategy", "recipes/rloo", "--hub_strategy x", "invalid choice: 'x'"),
    ("a flag cut short", "recipes/sft", "--learning 1", "unknown flag --learning. Did you mean --learning_rate?"),
    ("a flag misspelled", "recipes/reward", "--max_lenght 9", "unknown flag --max_lenght. Did you mean --max_length?"),
    ("another library's name", "recipes/sft", "--evaluation_strategy steps", "Did you mean --eval_strategy?"),
    ("another recipe's name", "recipes/ppo", "--max_new_tokens 4", "Did you mean --response_length?"),
    ("another recipe's name", "recipes/rloo", "--response_length 4", "Did you mean --max_completion_length?"),
    ("a short name", "recipes/sft", "--lr 1", "unknown flag --lr. Did you mean --learning_rate?"),
    ("a flag of old transformers", "recipes/sft", "--warmup_ratio 0.1", "Did you mean --warmup_steps?"),
    ("one dash", "recipes/sft", "-learning_rate 1", "'-learning_rate'", "belongs to no flag"),
    ("a word behind no flag", "recipes/tokenizer", "--min_frequency 2 3", "'3'", "belongs to no flag"),
    ("a list given twice", "recipes/ppo", "--lora_target_modules=a --lora-target-modules b", "given twice"),
    ("two names for one setting", "recipes/sft", "--gradient_checkpointing true --activation_checkpointing false",
     "--gradient_checkpointing and --activation_checkpointing"),
    ("bf16 and fp16", "recipes/sft", "--bf16 true --fp16 true", "--bf16 and --fp16"),
    ("4 and 8 bits", "recipes/sft", "--load_in_4bit true --load_in_8bit true", "--load_in_4bit and --load_in_8bit"),
    ("a computed flag", "recipes/ppo", "--batch_size 4", "--batch_size", "per_device_train_batch_size"),
    ("a computed flag", "recipes/ppo", "--world_size 2", "--world_size", "--num_processes"),
    ("a flag for Python only", "recipes/sft", "--parallelism_config x", "--parallelism_config", "YAML"),
    ("a pair as a word", "recipes/rloo", "--reward_clip_range 3", "--reward_clip_range", "YAML"),
    ("an empty name", "recipes/sft", "--output_dir=", "--output_dir: is empty"),
    ("an empty name", "recipes/ppo", "--reward_model_path ''", "--reward_model_path: is empty"),
    ("--config without a file", "recipes/sft", "--config", "--config needs a YAML file"),
    ("--config twice", "recipes/sft", "--config=a.yaml --config=b.yaml", "--config: is given twice"),
    ("a missing config", "recipes/sft", "--config gone.yaml", "--config gone.yaml: no such file"),
    ("a missing dataset", "recipes/sft", "--dataset_name gone.jsonl", "--dataset_name gone.jsonl: no such file"),
    ("a missing dataset of several", "recipes/sft", "--dataset_name made/data/sft.jsonl gone.jsonl",
     "--dataset_name gone.jsonl: no such file"),
    ("several datasets where one is read", "recipes/ppo", "--dataset_name made/data/prompts.jsonl more.jsonl",
     "'more.jsonl'", "belongs to no flag"),
    ("a missing model", "recipes/sft", "--model_name_or_path ./gone", "--model_name_or_path ./gone: no such model"),
    ("a missing reward model", "recipes/ppo", "--reward_model_path ./gone", "--reward_model_path ./gone: no such"),
    ("a missing model of an ensemble", "recipes/ppo", "--reward_model_path made/rm ./gone", "_path ./gone: no such"),
    ("a missing checkpoint", "recipes/sft", "--resume_from_checkpoint ./gone", "no such folder"),
    ("a missing template", "recipes/sft", "--chat_template_path gone.jinja", "gone.jinja: no such file"),
    ("a missing tokenizer", "recipes/pretrain", "--tokenizer_name ./gone", "--tokenizer_name ./gone: no tokenizer"),
    ("a missing DeepSpeed file", "recipes/sft", "--deepspeed gone.json", "--deepspeed gone.json: no such file"),
    ("a missing FSDP file", "recipes/sft", "--fsdp_config gone.json", "--fsdp_config gone.json: no such file"),
    ("a missing accelerator file", "recipes/sft", "--accelerator_config gone.json", "gone.json: no such file"),
    ("a missing config of a stage", "recipes/rounds", "--ppo_config gone.yaml", "--ppo_config gone.yaml: no such"),
    ("a missing config of a stage", "recipes/star", "--sft_config gone.yaml", "--sft_config gone.yaml: no such file"),
    ("a missing config of a stage", "recipes/scaling", "--base_config gone.yaml", "gone.yaml: no such file"),
    ("a missing run", "eval/curves", "--models ppo=./gone", "--models ppo=./gone: no finished run"),
    ("a missing baseline", "eval/in_context", "--baseline_dir ./gone", "--baseline_dir ./gone"),
    ("an unknown labeler", "recipes/collect", "--labeler cat", "--labeler", "simulated"),
    ("an unknown objective", "recipes/pretrain", "--objective guess", "--objective", "causal"),
    ("JSON that is none", "recipes/sft", "--model_init_kwargs {a", "--model_init_kwargs"),
    ("no JSON object", "recipes/sft", "--lr_scheduler_kwargs 5", "--lr_scheduler_kwargs"),
):  # fmt: skip
    add("flags", name, command, wrong, *says, early=True)

# ------------------------------------------------------------------------------- flags that libraries refuse late

for name, command, wrong, *says in (
    ("attention that doesn't exist", "recipes/sft", "--attn_implementation warp", "--attn_implementation warp"),
    ("attention that doesn't exist", "recipes/ppo", "--attn_implementation warp", "--attn_implementation warp"),
    ("attention that isn't installed", "recipes/reward", "--attn_implementation flash_attention_2",
     "--attn_implementation flash_attention_2"),
    ("layers that don't exist", "recipes/sft", "--lora_target_modules no_such_layer", "--lora_target_modules"),
    ("layers that don't exist", "recipes/reward", "--lora_target_modules no_such_layer", "--lora_target_modules"),
    ("layers that don't exist", "recipes/rloo", "--lora_target_modules no_such_layer", "--lora_target_modules"),
    ("modules to save that don't exist", "recipes/sft", "--lora_modules_to_save gone", "--lora_modules_to_save"),
    ("an optimizer that isn't installed", "recipes/sft", "--optim galore_adamw --optim_target_modules q", "--optim"),
    ("an argument that the optimizer lacks", "recipes/sft", "--optim_args speed=3", "--optim"),
    ("an argument that the schedule lacks", "recipes/sft", "--lr_scheduler_kwargs '{\"speed\": 3}'",
     "--lr_scheduler"),
    ("a schedule without its argument", "recipes/sft", "--lr_scheduler_type warmup_stable_decay", "--lr_scheduler"),
    ("best model, strategies differ", "recipes/sft", "--load_best_model_at_end true --eval_strategy epoch",
     "load_best_model_at_end"),
    ("a metric that isn't measured", "recipes/sft", "--load_best_model_at_end true --eval_strategy steps "
     "--eval_steps 1 --metric_for_best_model eval_beauty", "--metric_for_best_model"),
    ("a metric that isn't measured", "recipes/finetune", "--eval_strategy steps --eval_steps 1 "
     "--metric_for_best_model eval_f1", "--metric_for_best_model eval_f1", "accuracy"),
    ("a metric that isn't measured", "recipes/pretrain", "--eval_strategy steps --eval_steps 1 "
     "--metric_for_best_model perplexity", "--metric_for_best_model perplexity", "loss"),
    ("a metric that isn't measured", "recipes/rloo", "--eval_strategy steps --eval_steps 1 "
     "--metric_for_best_model eval_beauty", "--metric_for_best_model eval_beauty", "eval_reward"),
    ("plateau without evaluation", "recipes/sft", "--lr_scheduler_type reduce_lr_on_plateau", "lr_scheduler_type"),
    ("a tracker that isn't known", "recipes/sft", "--report_to cloud", "--report_to cloud"),
    ("an odd loss", "recipes/sft", "--loss_type square", "--loss_type"),
    ("mini batches that don't divide", "recipes/ppo", "--num_mini_batches 3", "--num_mini_batches 3: must divide"),
    ("a run without a value function", "recipes/ppo", "--value_model_path nowhere", "--value_model_path nowhere: has"),
    ("epochs of saving", "recipes/ppo", "--save_strategy epoch", "--save_strategy"),
    ("a token behind the vocabulary", "recipes/ppo", "--stop_token_id 9999999", "--stop_token_id 9999999"),
    ("generations that don't divide", "recipes/rloo", "--num_generations 3", "num_generations"),
    ("a batch of generations that doesn't divide", "recipes/rloo", "--generation_batch_size 5",
     "generation_batch_size"),
    ("workers to prefetch for", "recipes/sft", "--dataloader_prefetch_factor 2", "--dataloader_prefetch_factor"),
    ("persistent workers without workers", "recipes/sft", "--dataloader_persistent_workers true", "persistent_workers"),
    ("streaming", "recipes/sft", "--dataset_streaming true", "--dataset_streaming"),
    ("a split that isn't there", "recipes/sft", "--dataset_train_split gone", "--dataset_train_split gone"),
    ("a test split that isn't there", "recipes/sft", "--dataset_test_split gone", "--dataset_test_split gone"),
    ("part of the starter", "recipes/finetune", "--dataset_name starter --dataset_config gone", "gone"),
    ("a revision of a folder", "recipes/sft", "--model_revision v9", "--model_revision v9"),
    ("no eos token", "recipes/sft", "--eos_token <nothing>", "--eos_token"),
    ("a long max_length", "recipes/sft", "--max_length 1", "--max_length 1"),
    ("heads that don't divide", "recipes/pretrain", "--num_attention_heads 3", "--num_attention_heads 3"),
    ("positions below the block size", "recipes/pretrain", "--max_position_embeddings 16", "--max_position_embeddings"),
    ("an unknown architecture", "recipes/pretrain", "--model_type lama", "--model_type lama", "llama"),
    ("an architecture without the head", "recipes/pretrain", "--objective masked", "--objective masked"),
    ("an override of no setting", "recipes/pretrain", "--config_overrides speed=3", "--config_overrides"),
    ("an override of the wrong type", "recipes/pretrain", "--config_overrides rope_theta=fast", "--config_overrides"),
    ("a small vocabulary", "recipes/tokenizer", "--vocab_size 100", "--vocab_size 100"),
    ("sizes and layers", "recipes/scaling", "--num_hidden_layers 1 1", "--num_hidden_layers"),
    ("too few budgets", "recipes/scaling", "--token_budgets 200 400", "--token_budgets"),
    ("a head that doesn't divide", "recipes/scaling", "--head_dim 7", "--head_dim 7"),
    ("a head that doesn't divide, too few sizes", "recipes/scaling", "--hidden_sizes 20 --num_hidden_layers 1 "
     "--head_dim 16", "--head_dim 16"),
    ("a forecast inside the fit", "recipes/scaling", "--forecast_hidden_size 8", "--forecast_hidden_size 8"),
    ("more text than there is", "recipes/scaling", "--token_budgets 200 400 999999", "--token_budgets 999999"),
    ("a cluster that isn't there", "recipes/instructions", "--held_out_clusters gone", "--held_out_clusters"),
    ("a task that isn't there", "recipes/instructions", "--tasks gone", "--tasks"),
    ("templates without a dataset", "recipes/instructions", "--templates made/data/text.jsonl", "--templates"),
    ("majority and rationalization", "recipes/star", "--majority_vote true --rationalize true", "--rationalize"),
    ("more examples than there are", "recipes/star", "--num_fewshot 60", "--num_fewshot 60"),
    ("a flag that wouldn't arrive", "recipes/star", "--lora_r 5", "--lora_r 5"),
    ("LoRA and a frozen body", "recipes/finetune", "--freeze_body true", "--freeze_body"),
    ("more samples than rows", "recipes/finetune", "--max_train_samples 999", "--max_train_samples 999"),
    ("longer than the context", "recipes/finetune", "--max_length 999", "--max_length 999"),
    ("longer than the context", "recipes/sft", "--max_length 999", "--max_length 999"),
    ("a reply longer than the context", "recipes/ppo", "--response_length 999", "context of 256"),
    ("shares of other datasets", "recipes/reward", "--dataset_probs 0.5 0.5", "--dataset_probs: 2 shares for 1 datas"),
    ("a share of one dataset", "recipes/reward", "--dataset_probs 1", "--dataset_probs: shares are of several"),
    ("when to stop drawing, without shares", "recipes/sft", "--stopping_strategy all_exhausted",
     "--stopping_strategy all_exhausted: has no effect without --dataset_probs"),
    ("sad messages to pretrain on", "recipes/pretrain", "--dataset_name starter --dataset_config moods",
     "--dataset_config moods"),
    ("a dataset twice", "recipes/sft", "--dataset_name made/data/sft.jsonl made/data/sft.jsonl", "is given twice"),
    ("a configuration of several datasets", "recipes/reward",
     "--dataset_name made/data/pref.jsonl starter --dataset_config small", "--dataset_config small: belongs to one"),
    ("datasets of other columns", "recipes/reward", "--dataset_name made/data/pref.jsonl made/data/text.jsonl",
     "--dataset_name made/data/text.jsonl: needs column"),
    ("weights for other rewards", "recipes/ppo", "--reward_weights 1 2 3", "--reward_weights"),
    ("a weight for each model of an ensemble", "recipes/ppo",
     "--reward_model_path made/rm made/rm --reward_weights 1 2 3", "--reward_weights: 3 weights", "one ensemble"),
    ("an ensemble of one", "recipes/ppo", "--reward_model_path made/rm --reward_ensemble wco",
     "--reward_ensemble wco: combines several models"),
    ("an ensemble of one", "eval/overoptimization", "--reward_ensemble uwo --reward_model_path made/rm",
     "--reward_ensemble uwo: combines several models"),
    ("a coefficient of no ensemble", "recipes/ppo", "--uwo_coef 0.5", "--uwo_coef 0.5: has no effect with"),
    ("a coefficient of another ensemble", "eval/overoptimization",
     "--reward_model_path made/rm made/rm --reward_ensemble wco --uwo_coef 0.5", "--uwo_coef 0.5: has no effect with"),
    ("texts without a weight", "recipes/ppo", "--ptx_dataset_name made/data/sft.jsonl",
     "--ptx_dataset_name made/data/sft.jsonl: has no effect without --ptx_coef"),
    ("no such address", "recipes/collect", "--labeler human --server_name no.such.host.invalid --reward_funcs -",
     "--server_name no.such.host.invalid"),
    ("a foreign address", "recipes/chat", "--page true --server_name 8.8.8.8", "--server_name 8.8.8.8"),
    ("names that are equal", "recipes/chat", "--models a=made/lm a=made/sft", "--models"),
    ("a name with a slash", "eval/compression", "--models a/b=made/lm", "--models"),
    ("a name with a newline", "recipes/chat", "--models 'a\nb=made/lm' c=made/sft", "--models"),
    ("a reference that isn't there", "eval/compare", "--reference gone", "--reference gone"),
    ("a judge that isn't there", "eval/compare", "--judges cat", "--judges", "gold"),
    ("gold without the starter", "eval/compare", "--judges gold", "--judges gold"),
    ("simulated people without the starter", "eval/compare", "--judges simulated", "--judges simulated"),
    ("turns for nobody", "eval/compare", "--few_shot cat=turns.json", "--few_shot cat=...: not among --models"),
    ("turns that aren't there", "eval/compare", "--few_shot lm=turns.json", "--few_shot lm=turns.json: no such file"),
    ("a score that isn't there", "eval/few_shot", "--reward_funcs -", "--reward_funcs: needed"),
    ("more examples than rows", "eval/few_shot", "--num_fewshot 5000", "5000 must be left as examples"),
    ("one of two rewards", "eval/front", "--reward_funcs rewards.length", "--reward_funcs rewards.length: found 1"),
    ("two rewards that are one", "eval/front", "--reward_funcs starter starter", "starter starter: both are the same"),
    ("no rewards", "eval/front", "--reward_funcs -", "--reward_funcs: found 0"),
    ("a reward that isn't there", "eval/front", "--reward_funcs rewards.length rewards.width", "no function 'width'"),
    ("a language model as reward", "eval/front", "--reward_funcs starter made/lm", "sequence classifier"),
    ("a name that samples need", "eval/front", "--models scores=made/lm", "the results call something else 'scores'"),
    ("one model", "eval/front", "--model_name_or_path made/lm", "models are given with --models"),
    ("an order too large", "eval/compression", "--ngram_order 9", "--ngram_order 9"),
    ("a task of no harness", "eval/in_context", "--tasks nothing_like_it", "--tasks"),
    ("no PPO run", "eval/overoptimization", "--model_name_or_path made/finetune", "no run of recipes/ppo.py"),
    ("no truth", "eval/overoptimization", "--eval_reward_funcs -", "--eval_reward_funcs"),
    ("no curve", "eval/curves", "--models a=made/finetune", "--models a=made/finetune"),
    ("no reward model", "eval/reward_bench", "--reward_model_path -", "--reward_model_path: name the reward model"),
    ("no subsets", "eval/reward_bench", "--dataset_name made/data/pref.jsonl", "needs column", "'subset'"),
    ("no such split", "eval/reward_bench", "--dataset_test_split gone", "no rows in a split gone; found train"),
    ("a language model as reward", "eval/reward_bench", "--reward_model_path made/lm", "sequence classifier"),
    ("no reference", "eval/transfer", "--reference gone", "--reference gone"),
    ("a smoothed loss", "recipes/sft", "--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1", "smoothed"),
    ("a smoothed loss", "recipes/pretrain", "--label_smoothing_factor 0.4", "--label_smoothing_factor 0.4", "smoothed"),
    ("a smoothed loss", "recipes/reward", "--label_smoothing_factor 0.4", "--label_smoothing_factor 0.4", "no effect"),
    ("a smoothed loss", "recipes/rloo", "--label_smoothing_factor 0.4", "--label_smoothing_factor 0.4", "no effect"),
    ("a smoothed loss", "recipes/finetune", "--label_smoothing_factor 0.4 --lm_coef 0.5", "--lm_coef"),
    ("labels of another name", "recipes/sft", "--label_names x", "--label_names x"),
    ("labels of another name", "recipes/finetune", "--label_names x y", "--label_names x y"),
    ("labels of another name", "recipes/ppo", "--label_names x", "--label_names x"),
    ("no predictions", "recipes/finetune", "--prediction_loss_only true", "--prediction_loss_only true"),
    ("predictions in pieces", "recipes/finetune", "--batch_eval_metrics true", "--batch_eval_metrics true"),
    ("predictions in pieces", "recipes/pretrain", "--eval_do_concat_batches false", "--eval_do_concat_batches false"),
    ("rows to predict", "recipes/reward", "--do_predict true", "--do_predict true"),
    ("how a model is loaded", "recipes/sft", "--model_init_kwargs '{\"speed\": 3}'", "--model_init_kwargs", "--dtype"),
    ("prompts in order", "recipes/rloo", "--train_sampling_strategy sequential", "--train_sampling_strategy seq"),
    ("prompts in order", "recipes/ppo", "--train_sampling_strategy sequential", "--train_sampling_strategy seq"),
    ("a debugger", "recipes/ppo", "--debug underflow_overflow", "--debug underflow_overflow", "no effect"),
    ("a model without its optimizer", "recipes/ppo", "--save_only_model true", "--save_only_model true", "no effect"),
    ("an unknown cache", "recipes/rloo", "--cache_implementation warp", "--cache_implementation", "warp", "static"),
    ("an unknown setting of sampling", "recipes/rloo", "--generation_kwargs '{\"speed\": 3}'", "'speed'"),
    ("beams", "recipes/rloo", "--generation_kwargs '{\"num_beams\": 3}'", "--generation_kwargs", "num_beams"),
    ("a reference that isn't there", "recipes/rloo", "--sync_ref_model true", "--sync_ref_model true", "--use_peft"),
    ("a reference that isn't there", "recipes/rloo", "--sync_ref_model true --use_peft false --beta 0", "--beta 0"),
    ("a package that isn't installed", "recipes/sft", "--use_liger_kernel true", "--use_liger_kernel", "liger-kernel"),
    ("a package that isn't installed", "recipes/pretrain", "--use_liger_kernel true", "--use_liger_kernel", "install"),
    ("nothing to train", "recipes/sft", "--load_in_4bit true --use_peft false", "--load_in_4bit true",
     "--use_peft"),
    ("a number for settings", "recipes/ppo", "--accelerator_config '{\"gradient_accumulation_kwargs\": 3}'",
     "--accelerator_config: 'gradient_accumulation_kwargs'"),
    ("a setting of TRL's own engine", "recipes/rloo", "--vllm_tensor_parallel_size 2", "--vllm_tensor_parallel_size 2"),
    ("nobody logged in", "recipes/sft", "--report_to wandb", "--report_to wandb", "wandb login", "WANDB_MODE=offline"),
    ("nobody logged in", "recipes/ppo", "--report_to wandb", "--report_to wandb", "wandb login"),
    ("processes to talk to", "recipes/sft", "--ddp_backend gloo", "--ddp_backend", "one process"),
    ("a mode of no compiler", "recipes/sft", "--torch_compile true --torch_compile_mode warp",
     "--torch_compile_mode warp"),
    ("a compiler that isn't there", "recipes/reward", "--torch_compile true --torch_compile_backend warp",
     "--torch_compile_backend warp"),
    ("no padding and no packing", "recipes/sft", "--padding_free true", "--padding_free true", "--packing true"),
):  # fmt: skip
    add("refused late", name, command, wrong, *says)
for command in ("recipes/sft", "recipes/reward", "recipes/finetune"):
    add("refused late", "fewer rows than a batch", command, "--dataloader_drop_last true --per_device_train_batch_size "
        "64", "--dataloader_drop_last true", "per_device_train_batch_size", finish=True,
        right="--dataloader_drop_last true --per_device_eval_batch_size 64")  # fmt: skip

# -------------------------------------------------------------------------------------- engines, sharding, plans

BATCHED = "--use_transformers_continuous_batching true"
for name, command, wrong, *says in (
    ("vLLM in the same process", "recipes/ppo", "--use_vllm true --vllm_mode colocate", "--vllm_mode colocate"),
    ("vLLM in the same process", "recipes/collect", "--use_vllm true --vllm_mode colocate", "--vllm_mode colocate"),
    ("vLLM in the same process", "recipes/rloo", "--use_vllm true --vllm_mode colocate", "--vllm_mode colocate"),
    ("no server", "recipes/rloo", "--use_vllm true --vllm_server_port 1 --vllm_server_timeout 0.1", "does not answer"),
    ("a part of the distribution", "recipes/rloo", f"{BATCHED} --top_p 0.9", "--top_p: has no effect with"),
    ("an unknown mode", "recipes/ppo", "--use_vllm true --vllm_mode here", "invalid choice: 'here'"),
    ("two engines", "recipes/ppo", f"--use_vllm true {BATCHED}", "--use_vllm and"),
    ("two engines", "eval/compare", f"--use_vllm true {BATCHED}", "--use_vllm and"),
    ("no address", "recipes/ppo", "--use_vllm true --vllm_server_base_url localhost", "_base_url localhost"),
    ("a port that is none", "recipes/star", "--use_vllm true --vllm_server_port 99999", "--vllm_server_port 99999"),
    ("no server", "recipes/ppo", "--use_vllm true --vllm_server_port 1 --vllm_server_timeout 0.1", "does not answer"),
    ("no server", "recipes/collect", "--use_vllm true --vllm_server_port 1 --vllm_server_timeout 0.1",
     "does not answer"),
    ("no server", "eval/compare", "--use_vllm true --vllm_server_port 1 --vllm_server_timeout 0.1", "does not answer"),
    ("no time to wait", "recipes/ppo", "--use_vllm true --vllm_server_timeout -1", "--vllm_server_timeout -1"),
    ("a tied head for vLLM on a CPU", "recipes/ppo", "--model_name_or_path made/lm --use_vllm true --use_peft false",
     "tied to the embeddings", "--use_peft true"),
    ("settings of no engine", "recipes/ppo", "--transformers_continuous_batching_config {}", "has no effect without"),
    ("a setting that isn't known", "recipes/ppo",
     f"{BATCHED} --transformers_continuous_batching_config '{{\"speed\": 3}}'", "speed"),
    ("a seed of its own", "recipes/collect", f"{BATCHED} --transformers_continuous_batching_config '{{\"seed\": 7}}'",
     "'seed' is not yours to set", "--seed"),
    ("pages of nothing", "recipes/ppo", f"{BATCHED} --transformers_continuous_batching_config '{{\"page_size\": 0}}'",
     "page_size"),
    ("settings that are no JSON", "recipes/collect", f"{BATCHED} --transformers_continuous_batching_config '{{a'",
     "--transformers_continuous_batching_config"),
    ("bounds the wrong way", "recipes/ppo", "--vllm_importance_sampling_clip_min 5", "clip_min 5", "clip_max"),
    ("no memory", "recipes/ppo", "--plan true --plan_memory 0", "--plan_memory 0"),
    ("no memory", "recipes/sft", "--plan true --plan_memory nan", "--plan_memory nan"),
    ("memory and no plan", "recipes/sft", "--plan_memory 80", "--plan_memory", "--plan true"),
    ("no processes", "recipes/reward", "--plan true --plan_processes 0", "--plan_processes 0"),
):  # fmt: skip
    add("engines", name, command, wrong, *says)

# ---------------------------------------------------------------------------------------------- YAML

for name, command, content, *says in (
    ("a list for a number", "recipes/sft", "learning_rate: [1]\n", "c.yaml: learning_rate: needs a number"),
    ("a mapping for a number", "recipes/ppo", "kl_coef: {a: 1}\n", "c.yaml: kl_coef: needs a number"),
    ("null for a number", "recipes/sft", "lora_r: null\n", "c.yaml: lora_r: needs a whole number"),
    ("nothing for a number", "recipes/reward", "weight_decay:\n", "c.yaml: weight_decay: needs a number"),
    ("a bool for a number", "recipes/ppo", "num_ppo_epochs: yes\n", "c.yaml: num_ppo_epochs: needs a whole number"),
    ("a word for a number", "recipes/sft", "warmup_steps: few\n", "c.yaml: warmup_steps: needs a number"),
    ("a float for a whole number", "recipes/rloo", "num_iterations: 1.5\n", "num_iterations: needs a whole number"),
    ("a number for a bool", "recipes/sft", "use_peft: 2\n", "c.yaml: use_peft: needs true or false"),
    ("a bool for a choice", "recipes/sft", "eval_strategy: no\n", "c.yaml: eval_strategy: needs one of", "quotes"),
    ("a word that is no choice", "recipes/sft", "optim: best\n", "c.yaml: optim: needs one of"),
    ("a list for a choice", "recipes/sft", "lr_scheduler_type: [linear]\n", "c.yaml: lr_scheduler_type: needs one of"),
    ("a date for a text", "recipes/sft", "run_name: 2026-01-01\n", "c.yaml: run_name: needs text"),
    ("a number for a text", "recipes/sft", "hub_model_id: 7\n", "c.yaml: hub_model_id: needs text"),
    ("a number for a path", "recipes/collect", "judge_model_name_or_path: 7\n", "judge_model_name_or_path: needs text"),
    ("a list of words for numbers", "recipes/scaling", "token_budgets: [few, many]\n", "token_budgets: needs a list"),
    ("a mapping for a list", "recipes/ppo", "stop_strings: {a: b}\n", "c.yaml: stop_strings: needs a list"),
    ("nested lists", "recipes/chat", "models: [[a]]\n", "c.yaml: models: needs a list"),
    ("not a number", "recipes/sft", "learning_rate: .nan\n", "c.yaml: learning_rate nan: must be"),
    ("infinity", "recipes/ppo", "kl_coef: .inf\n", "c.yaml: kl_coef inf: must be"),
    ("below the range", "eval/compare", "best_of_n: -3\n", "c.yaml: best_of_n -3: must be"),
    ("above the range", "recipes/collect", "server_port: 70000\n", "c.yaml: server_port 70000: must be"),
    ("a list with a number out of range", "recipes/ppo", "stop_token_id: [1, -1]\n", "stop_token_id -1: must be"),
    ("an unknown key", "recipes/sft", "speed: 3\n", "c.yaml: unknown key 'speed'"),
    ("a misspelled key", "recipes/sft", "learning_rat: 3\n", "unknown key 'learning_rat'. Did you mean learning_rate?"),
    ("dashes in a key", "recipes/sft", "lora-r: 3\n", "unknown key 'lora-r'. Did you mean lora_r?"),
    ("a key that switches off", "recipes/sft", "no_use_cpu: true\n", "unknown key 'no_use_cpu'"),
    ("a key that is a number", "recipes/sft", "3: 4\n", "c.yaml: unknown key '3'"),
    ("a key that is a bool", "recipes/sft", "on: 4\n", "c.yaml: unknown key 'True'"),
    ("another recipe's key", "recipes/rloo", "response_length: 3\n", "Did you mean max_completion_length?"),
    ("a computed key", "recipes/ppo", "mini_batch_size: 3\n", "c.yaml: mini_batch_size is computed"),
    ("a key twice", "recipes/sft", "lora_r: 3\nlora_r: 4\n", "the key 'lora_r' stands twice"),
    ("an empty text", "recipes/sft", "dataset_name: ''\n", "c.yaml: dataset_name: is empty"),
    ("no mapping", "recipes/sft", "- a\n", "c.yaml: needs lines of the form"),
    ("an empty file", "recipes/sft", "", "c.yaml: needs lines of the form"),
    ("a number alone", "recipes/sft", "7\n", "c.yaml: needs lines of the form"),
    ("a colon too many", "recipes/sft", "a: b: c\n", "c.yaml: not readable as YAML"),
    ("a bracket too few", "recipes/ppo", "models: [a\n", "c.yaml: not readable as YAML"),
    ("a tab", "recipes/sft", "a:\n\t- b\n", "c.yaml: not readable as YAML"),
    ("two documents", "recipes/sft", "lora_r: 3\n---\nlora_r: 4\n", "c.yaml: not readable as YAML"),
    ("a Python object", "recipes/sft", "run_name: !!python/object/apply:os.system [ls]\n", "not readable as YAML"),
    ("an anchor of itself", "recipes/sft", "lora_target_modules: &a [*a]\n", "lora_target_modules: needs a list"),
    ("an unknown alias", "recipes/sft", "run_name: *a\n", "c.yaml: not readable as YAML"),
    ("bytes", "recipes/sft", b"\xff\xfe\x00\x01", "c.yaml: not readable as YAML"),
    ("an archive", "recipes/reward", b"PK\x03\x04\x00\x00\x00", "c.yaml: not readable as YAML"),
    ("an environment that is none", "recipes/sft", "env: 3\n", "c.yaml: env: needs a mapping"),
    ("two names for one setting", "recipes/sft", "gradient_checkpointing: true\nactivation_checkpointing: false\n",
     "gradient_checkpointing"),
):  # fmt: skip
    # the base's own flags are left out: what is typed would win
    keys = dict.fromkeys(line.split(":")[0] for line in str(content).splitlines())
    typed = " ".join(f"--{key} -" for key in keys if f"--{key} " in BASES[f"{command}.py"])
    add("yaml", name, command, "--config c.yaml", *says, files={"c.yaml": content}, base=typed, early=True)
add("yaml", "a folder", "recipes/sft", "--config c.yaml", "--config c.yaml: no such file", early=True,
    files={"c.yaml": folder_instead})  # fmt: skip

# ---------------------------------------------------------------------------------------------- data

SFT_ROW, PREF_ROW, PROMPT_ROW = ROWS["sft"][0], ROWS["pref"][0], ROWS["prompts"][0]
GOOD = {"recipes/sft": "sft", "recipes/reward": "pref", "recipes/ppo": "prompts", "recipes/finetune": "labelled",
        "recipes/collect": "prompts", "recipes/rloo": "prompts", "recipes/pretrain": "text", "recipes/star": "problems",
        "recipes/tokenizer": "text", "eval/compare": "prompts"}  # fmt: skip
for name, command, rows, *says in (
    ("an empty file", "recipes/sft", "", "--dataset_name d.jsonl"),
    ("no JSON", "recipes/sft", "hello\nworld\n", "--dataset_name d.jsonl"),
    ("half a line", "recipes/sft", lines(ROWS["sft"]) + '{"prompt": [{"role"', "--dataset_name d.jsonl"),
    ("latin-1", "recipes/sft", '{"text": "caf\xe9"}\n'.encode("latin-1"), "--dataset_name d.jsonl"),
    ("bytes", "recipes/pretrain", b"\x00\x01\x02\xff" * 50, "--dataset_name d.jsonl"),
    ("rows that are numbers", "recipes/sft", "1\n2\n3\n", "--dataset_name d.jsonl"),
    ("rows that are lists", "recipes/sft", "[1]\n[2]\n", "--dataset_name d.jsonl"),
    ("other columns", "recipes/sft", lines([{"question": "a", "reply": "b"}] * 4), "d.jsonl", "messages"),
    ("other columns", "recipes/reward", lines([SFT_ROW] * 4), "d.jsonl", "chosen"),
    ("other columns", "recipes/ppo", lines([{"text": "a"}] * 4), "d.jsonl", "prompt"),
    ("other columns", "recipes/finetune", lines([{"text": "a"}] * 4), "d.jsonl", "label"),
    ("other columns", "recipes/pretrain", lines([{"body": "a"}] * 4), "d.jsonl", "text"),
    ("other columns", "recipes/star", lines([{"answer": "a"}] * 4), "d.jsonl", "prompt"),
    ("an empty reply", "recipes/sft", lines([*ROWS["sft"], SFT_ROW | {"completion": assistant("")}]), "d.jsonl", "row"),
    ("a missing reply", "recipes/sft", lines([*ROWS["sft"], SFT_ROW | {"completion": None}]), "d.jsonl", "row"),
    ("no messages", "recipes/sft", lines([{"messages": []}] * 4), "d.jsonl"),
    ("a role that isn't known", "recipes/sft",
     lines([{"messages": [{"role": "human", "content": "a"}, *assistant("b")]}] * 4), "d.jsonl", "human"),
    ("a message without content", "recipes/sft", lines([{"messages": [{"role": "user"}, *assistant("b")]}] * 4),
     "d.jsonl"),
    ("content that is a number", "recipes/sft", lines([{"messages": [{"role": "user", "content": 7}]}] * 4), "d.jsonl"),
    ("no reply in a chat", "recipes/sft", lines([{"messages": user("a")}] * 4), "d.jsonl"),
    ("a text prompt and a reply of messages", "recipes/sft",
     lines([{"prompt": "a", "completion": assistant("b")}] * 4), "d.jsonl", "completion"),
    ("messages and a text", "recipes/reward", lines([PREF_ROW | {"rejected": "no"}] * 4), "d.jsonl", "rejected"),
    ("pairs of equals", "recipes/reward", lines([PREF_ROW | {"rejected": PREF_ROW["chosen"]}] * 4), "d.jsonl"),
    ("a pair without the worse", "recipes/reward", lines([*ROWS["pref"], PREF_ROW | {"rejected": None}]), "d.jsonl",
     "rejected"),
    ("text and messages mixed", "recipes/ppo", lines([*ROWS["prompts"], {"prompt": "a"}]), "d.jsonl"),
    ("an empty prompt", "recipes/ppo", lines([*ROWS["prompts"], {"prompt": user("")}]), "d.jsonl"),
    ("a missing prompt", "recipes/ppo", lines([*ROWS["prompts"], {"prompt": None}]), "d.jsonl"),
    ("a number for a prompt", "recipes/rloo", lines([{"prompt": 5}] * 8), "d.jsonl", "prompt"),
    ("a reserved column", "recipes/ppo", lines([row | {"input_ids": [1]} for row in ROWS["prompts"]]), "input_ids"),
    ("prompts longer than the context", "recipes/ppo", lines([{"prompt": user("tea " * 900)}] * 8), "d.jsonl"),
    ("prompts longer than the context", "recipes/collect", lines([{"prompt": user("tea " * 900)}] * 8), "d.jsonl"),
    ("prompts longer than the context", "eval/compare", lines([{"prompt": user("tea " * 900)}] * 8), "d.jsonl"),
    ("one label", "recipes/finetune", lines([{"text": "a", "label": "x"}] * 8), "d.jsonl", "label"),
    ("a span outside", "recipes/finetune", lines([{"question": "a?", "context": "b c d",
     "answers": {"text": ["zzz"], "answer_start": [50]}}] * 8), "answer_start"),
    ("words and tags that differ", "recipes/finetune", lines([{"tokens": ["a", "b"], "tags": ["X"]}] * 8), "d.jsonl"),
    ("text that is a number", "recipes/pretrain", lines([{"text": 5}] * 4), "d.jsonl", "text"),
    ("empty texts", "recipes/pretrain", lines([{"text": ""}] * 4), "d.jsonl"),
    ("empty texts", "recipes/tokenizer", lines([{"text": ""}] * 4), "d.jsonl"),
    ("too little text", "recipes/pretrain", lines([{"text": "a"}] * 2), "--block_size 32", "Give more text"),
    ("no answers to learn from", "recipes/star", lines([{"prompt": "a?"}] * 9), "--num_fewshot"),
    ("a problem in both splits", "recipes/star", lines([ROWS["problems"][0]] * 20), "d.jsonl"),
):  # fmt: skip
    add("data", name, command, "--dataset_name d.jsonl", *says, files={"d.jsonl": rows},
        right=f"--dataset_name made/data/{GOOD[command]}.jsonl")  # fmt: skip
add("data", "one JSON object", "recipes/sft", "--dataset_name d.json", "d.json", files={"d.json": '{"a": [1, 2]}'})
add("data", "a CSV without a header", "recipes/sft", "--dataset_name d.csv", "d.csv", files={"d.csv": "1,2\n3,4\n"})
add("data", "a Parquet file of text", "recipes/sft", "--dataset_name d.parquet", "d.parquet",
    files={"d.parquet": "hello"})  # fmt: skip
add("data", "an empty folder", "recipes/sft", "--dataset_name d", "--dataset_name d", files={"d/.keep": ""})
add(
    "data",
    "a kind of file that isn't read",
    "recipes/sft",
    "--dataset_name ./d.xlsx",
    "d.xlsx",
    files={"d.xlsx": b"PK"},
)
add("data", "everything is cut", "recipes/sft", "--max_length 2", "--max_length 2", finish=True)

# ---------------------------------------------------------------------------------------------- models

for name, command, model, *says in (
    ("without weights", "recipes/sft", copy("lm", weights=None), "--model_name_or_path m"),
    ("weights of text", "recipes/sft", copy("lm", weights="hello"), "--model_name_or_path m"),
    ("half of the weights", "recipes/sft", copy("lm", weights=halved), "--model_name_or_path m"),
    ("half of the weights", "recipes/ppo", copy("lm", weights=halved), "--model_name_or_path m"),
    ("empty weights", "recipes/reward", copy("lm", weights=b""), "--model_name_or_path m"),
    ("a folder for weights", "recipes/sft", copy("lm", weights=folder_instead), "--model_name_or_path m"),
    ("a pickle only", "recipes/sft", copy("lm", weights=lambda file: file.rename(file.with_name("pytorch_model.bin"))),
     "--model_name_or_path m", "safetensors"),
    ("an empty config", "recipes/sft", copy("lm", config=""), "--model_name_or_path m"),
    ("a config of text", "recipes/rloo", copy("lm", config="hello"), "--model_name_or_path m"),
    ("a config that is a list", "recipes/sft", copy("lm", config="[1]"), "--model_name_or_path m"),
    ("a config without a type", "recipes/sft", copy("lm", config=with_keys(model_type=None)), "--model_name_or_path m"),
    ("a type that isn't known", "recipes/sft", copy("lm", config=with_keys(model_type="warp")), "m", "warp"),
    ("sizes that don't fit", "recipes/sft", copy("lm", config=with_keys(hidden_size=32)), "--model_name_or_path m"),
    ("sizes that don't fit", "recipes/collect", copy("lm", config=with_keys(vocab_size=99)), "--model_name_or_path m"),
    ("a size that is a word", "recipes/sft", copy("lm", config=with_keys(hidden_size="big")), "--model_name_or_path m"),
    ("no heads", "recipes/sft", copy("lm", config=with_keys(num_attention_heads=0)), "--model_name_or_path m"),
    ("no layers", "recipes/sft", copy("lm", config=with_keys(num_hidden_layers=-1)), "num_hidden_layers -1"),
    ("a size that is text", "recipes/ppo", copy("lm", config=with_keys(rms_norm_eps="x")), "rms_norm_eps", "str"),
    ("a function that isn't known", "recipes/sft", copy("lm", config=with_keys(hidden_act="warp")), "no 'warp'"),
    ("code of its own", "recipes/sft", copy("lm", config=with_keys(
        model_type="own", auto_map={"AutoConfig": "own.Own"})), "--model_name_or_path m", "trust_remote_code"),
    ("a folder without a model", "recipes/sft", copy("data"), "--model_name_or_path m", "config.json"),
    ("an encoder", "recipes/sft", copy("bert"), "--model_name_or_path m"),
    ("an encoder", "recipes/ppo", copy("bert"), "--model_name_or_path m"),
    ("a classifier", "recipes/ppo", copy("rm"), "--model_name_or_path m"),
    ("a classifier", "recipes/collect", copy("rm"), "--model_name_or_path m"),
    ("a classifier", "recipes/rounds", copy("rm"), "--model_name_or_path m"),
    ("an adapter to fine-tune", "recipes/finetune", copy("sft"), "--model_name_or_path m", "adapter"),
    ("a broken generation config", "recipes/collect", copy("lm", generation="{"), "--model_name_or_path m"),
    ("no tokenizer", "recipes/sft", copy("lm", tokenizer=None, tokenizer_config=None), "--model_name_or_path m",
     "tokenizer.json"),
    ("a tokenizer of text", "recipes/sft", copy("lm", tokenizer="hello"), "--model_name_or_path m"),
    ("a tokenizer that is empty", "recipes/sft", copy("lm", tokenizer="{}"), "--model_name_or_path m"),
    ("half of the tokenizer", "recipes/ppo", copy("lm", tokenizer=halved), "--model_name_or_path m"),
    ("a broken tokenizer config", "recipes/sft", copy("lm", tokenizer_config="{"), "--model_name_or_path m"),
    ("a template that adds a number", "recipes/sft", copy("lm", template="{{ messages + 1 }}"), "template"),
    ("a template with a syntax error", "recipes/sft", copy("lm", template="{% for %}"), "template"),
    ("a template that raises", "recipes/ppo", copy("lm", template="{{ raise_exception('never') }}"), "template"),
    ("a template without replies", "recipes/sft", copy(
        "lm", template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"), "template"),
    ("a template without end", "recipes/sft", copy("lm", template="{% for a in range(99999) %}"
     "{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"), "template"),
    ("an adapter config of text", "recipes/ppo", copy("sft", adapter="{a"), "--model_name_or_path m"),
    ("an adapter config that is a list", "recipes/ppo", copy("sft", adapter="[]"), "--model_name_or_path m"),
    ("an adapter of itself", "recipes/ppo", copy("sft", adapter=with_keys(base_model_name_or_path="m")),
     "--model_name_or_path m"),
    ("an adapter without a base", "recipes/ppo", copy("sft", adapter=with_keys(base_model_name_or_path=None)),
     "--model_name_or_path m", "base"),
    ("an adapter of a missing base", "recipes/sft", copy("sft", adapter=with_keys(base_model_name_or_path="./gone")),
     "--model_name_or_path m", "./gone"),
    ("an adapter without weights", "recipes/ppo", copy("sft", adapter_weights=None), "--model_name_or_path m"),
    ("half of an adapter's weights", "recipes/ppo", copy("sft", adapter_weights=halved), "--model_name_or_path m"),
    ("an adapter of another rank", "recipes/ppo", copy("sft", adapter=with_keys(r=7)), "--model_name_or_path m"),
    ("an adapter of a type that isn't known", "recipes/ppo", copy("sft", adapter=with_keys(peft_type="WARP")),
     "--model_name_or_path m"),
    ("an adapter of layers that don't exist", "recipes/ppo", copy("sft", adapter=with_keys(target_modules=["gone"])),
     "--model_name_or_path m"),
):  # fmt: skip
    add("models", name, command, "--model_name_or_path m", *says, files={"m": model}, finish=name == "without weights")
for name, command, flag, model in (
    ("a reward model without weights", "recipes/ppo", "reward_model_path", copy("rm", weights=None)),
    ("half of a reward model", "recipes/ppo", "reward_model_path", copy("rm", weights=halved)),
    ("half of a reward model", "recipes/rloo", "reward_model_path", copy("rm", weights=halved)),
    ("a reward model of three labels", "recipes/ppo", "reward_model_path", copy("three")),
    ("a language model as reward", "recipes/ppo", "reward_model_path", copy("lm")),
    ("a broken SFT model", "recipes/ppo", "sft_model_path", copy("lm", config="{")),
    ("half of a reward model", "eval/compare", "reward_model_path", copy("rm", weights=halved)),
):
    add("models", name, command, f"--{flag} m", f"--{flag} m", files={"m": model})
for name, command, wrong, *says in (
    ("a classifier", "eval/compare", "--models sft=made/sft p=made/rm", "--models"),
    ("half of the weights", "eval/compare", "--models sft=made/sft p=m", "--models", "m"),
    ("half of the weights", "recipes/chat", "--models m", "m"),
    ("half of the weights", "eval/compression", "--models p=m", "m"),
    ("an encoder", "eval/compression", "--models p=made/bert", "bert"),
):
    add("models", name, command, wrong, *says, files={"m": copy("lm", weights=halved)})
for command in ("recipes/sft", "recipes/reward", "recipes/ppo", "recipes/rloo", "recipes/collect", "recipes/finetune",
                "recipes/star", "eval/in_context"):  # fmt: skip
    add("models", "a weight that is NaN", command, "--model_name_or_path m", "--model_name_or_path m", "NaN",
        files={"m": copy("lm", weights=of_nan)})  # fmt: skip
for command in ("recipes/chat", "eval/compare", "eval/compression"):
    add("models", "a weight that is NaN", command, "--models sft=m lm=made/lm", "--models", "m", "NaN",
        files={"m": copy("lm", weights=of_nan)})  # fmt: skip
add("models", "an adapter of NaN", "recipes/ppo", "--model_name_or_path m", "--model_name_or_path m", "NaN",
    files={"m": copy("sft", adapter_weights=of_nan)})  # fmt: skip
add("models", "a reward model of NaN", "recipes/ppo", "--reward_model_path m", "--reward_model_path m", "NaN",
    files={"m": copy("rm", weights=of_nan)})  # fmt: skip
for command, flag in (("recipes/sft", "--model_name_or_path "), ("recipes/star", "--model_name_or_path "),
                      ("eval/in_context", "--model_name_or_path "), ("eval/compression", "--models p="),
                      ("recipes/chat", "--models p=")):  # fmt: skip
    add("models", "a classifier where replies are wanted", command, f"{flag}made/rm", flag.split()[0], "made/rm")
add("models", "a Hub id with dots", "recipes/sft", "--model_name_or_path a/..", "--model_name_or_path a/..")
add("models", "a Hub id with a space", "recipes/sft", "--model_name_or_path 'a b/c'", "--model_name_or_path a b/c")
add("models", "a Hub id offline", "recipes/sft", "--model_name_or_path someone/model", "someone/model")

# ---------------------------------------------------------------------------------------------- folders

for name, command, wrong, files, *says in (
    ("below a file", "recipes/sft", "--output_dir file/x", {"file": ""}, "--output_dir file/x"),
    ("a file", "recipes/sft", "--output_dir file", {"file": ""}, "--output_dir file"),
    ("a file", "recipes/collect", "--output_dir file", {"file": ""}, "--output_dir file"),
    ("in /proc", "recipes/sft", "--output_dir /proc/x", {}, "--output_dir /proc/x"),
    ("foreign files", "recipes/sft", "--output_dir o", {"o/mine.txt": "a"}, "--output_dir o", "not empty"),
    ("foreign files", "eval/compare", "--output_dir o", {"o/mine.txt": "a"}, "--output_dir o", "not empty"),
    ("another run", "recipes/sft", "--output_dir o", {"o": copy("tok")}, "--output_dir o", "another run"),
    ("another run", "recipes/ppo", "--output_dir o", {"o": copy("ppo")}, "--output_dir o", "another run"),
    ("run.json is a list", "recipes/sft", "--output_dir o", {"o/run.json": "[]"}, "run.json"),
    ("run.json is text", "recipes/reward", "--output_dir o", {"o/run.json": "{a"}, "run.json"),
    ("run.json without keys", "recipes/sft", "--output_dir o", {"o/run.json": "{}"}, "run.json"),
    ("run.json of bytes", "recipes/sft", "--output_dir o", {"o/run.json": b"\xff\xfe"}, "run.json"),
    ("run.json is a folder", "recipes/sft", "--output_dir o", {"o/run.json/x": ""}, "run.json"),
    ("settings are a list", "recipes/sft", "--output_dir o", {"o/run.json":
        '{"recipe": "sft", "command": "a b c", "settings": [], "finished": false}'}, "run.json"),
    ("run.json is text", "recipes/chat", "--output_dir o", {"o/run.json": "{a"}, "run.json"),
    ("a checkpoint that is a model", "recipes/sft", "--resume_from_checkpoint made/lm", {}, "--resume_from_checkpoint"),
    ("a checkpoint that is a model", "recipes/ppo", "--resume_from_checkpoint made/lm", {}, "--resume_from_checkpoint"),
    ("a checkpoint that is empty", "recipes/reward", "--resume_from_checkpoint o", {"o/.x": ""},
     "--resume_from_checkpoint"),
    ("a newline in the name", "recipes/sft", "--output_dir 'a\nb'", {}, "--output_dir"),
    ("a report of no run", "eval/report", "--output_dir o", {"o/x": ""}, "--output_dir o"),
    ("a report of a broken run", "eval/report", "--output_dir o", {"o": copy("tok", run="{a")}, "run.json"),
    ("a broken log", "eval/report", "--output_dir o", {"o": copy("ppo", state="{a")}, "trainer_state.json"),
    ("a broken run", "eval/curves", "--models ppo=o", {"o": copy("ppo", run="{a")}, "run.json"),
    ("a broken log", "eval/curves", "--models ppo=o", {"o": copy("ppo", state="{a")}, "trainer_state.json"),
    ("a broken evaluation", "eval/transfer", "--models scratch=o", {"o": copy("finetune", evaluation="{a")},
     "evaluation.json"),
    ("a broken run", "eval/overoptimization", "--model_name_or_path o", {"o": copy("ppo", run="[]")}, "run.json"),
    ("no checkpoints", "eval/overoptimization", "--model_name_or_path o", {"o/run.json":
        '{"recipe": "ppo", "command": "a b c", "settings": {}, "finished": true}'}, "checkpoints"),
    ("turns without messages", "eval/compare", "--few_shot lm=t.json", {"t.json": "{}"}, "t.json", "messages"),
    ("turns of a system", "eval/compare", "--few_shot lm=t.json", {"t.json":
        '{"messages": [{"role": "system", "content": "a"}]}'}, "--few_shot lm=t.json", "user and assistant"),
    ("votes that are no votes", "recipes/chat", "--output_dir o", {"o/votes.jsonl": '{"a": 1}\n'}, "votes.jsonl"),
    ("ranks that are words", "recipes/chat", "--output_dir o", {"o/tasks.jsonl": "", "o/votes.jsonl":
        '{"task": "t", "labeler": "me", "ranks": ["a", "b"]}\n'}, "votes.jsonl"),
):  # fmt: skip
    add(
        "folders",
        name,
        command,
        wrong,
        *says,
        files=files,
        right="--output_dir made/tok" if command == "eval/report" else "",
    )

for name, command, wrong, *says in (
    ("a checkpoint of another recipe", "recipes/reward", "--resume_from_checkpoint made/finetune/checkpoint-1", "fit"),
    ("a checkpoint of another rank", "recipes/finetune", "--resume_from_checkpoint made/finetune/checkpoint-1 "
     "--lora_r 8", "doesn't fit", "size mismatch"),
    ("a checkpoint of another rank", "recipes/ppo", "--resume_from_checkpoint made/ppo/checkpoint-1 --lora_r 8 "
     "--model_name_or_path made/lm", "trains other tensors"),
):  # fmt: skip
    add("folders", name, command, wrong, "--resume_from_checkpoint", *says, finish=True)
for instead in ("", lambda path: path.symlink_to("nowhere")):
    add("folders", "a checkpoint that is no folder", "recipes/sft", "--output_dir o", "--output_dir o", "checkpoint-3",
        files={"o": copy("finetune"), "o/checkpoint-3": instead})  # fmt: skip
for name, command, run, file in (
    ("a finished run without its adapter", "recipes/finetune", "finetune", "adapter_weights"),
    ("a finished run without its adapter", "recipes/ppo", "ppo", "adapter_weights"),
    ("a finished run without its tokenizer", "recipes/tokenizer", "tok", "tokenizer"),
):
    damaged = {"o": copy(run, **{file: None}), "made_rewards.py": FUNCTION}
    base = "--reward_funcs made_rewards.length" if command == "recipes/ppo" else ""
    add(
        "folders",
        name,
        command,
        "--output_dir o",
        "--output_dir o",
        "is missing",
        files=damaged,
        base=base,
        finish=True,
    )

# ---------------------------------------------------------------------------------------------- reward functions

for name, source, *says in (
    ("with a syntax error", "def f(:\n", "--reward_funcs", "bad.f"),
    ("that exits at import", "import sys\nsys.exit(5)\ndef f(): pass\n", "--reward_funcs", "bad.f"),
    ("that raises at import", "raise KeyError('a')\n", "--reward_funcs", "bad.f"),
    ("that isn't there", "def g(): pass\n", "--reward_funcs", "bad.f"),
    ("that is no function", "f = 3\n", "--reward_funcs", "bad.f"),
    ("without arguments", "def f():\n    return []\n", "f"),
    ("that raises", "def f(completions, **kw):\n    raise KeyError('a')\n", "f"),
    ("that exits", "import sys\ndef f(completions, **kw):\n    sys.exit(3)\n", "f"),
    ("that returns nothing", "def f(completions, **kw):\n    pass\n", "f"),
    ("that returns a number", "def f(completions, **kw):\n    return 1.0\n", "f"),
    ("that returns words", "def f(completions, **kw):\n    return ['good'] * len(completions)\n", "f"),
    ("that returns too few", "def f(completions, **kw):\n    return [1.0]\n", "f"),
    ("that returns too many", "def f(completions, **kw):\n    return [1.0] * 99\n", "f"),
    ("that returns NaN", "def f(completions, **kw):\n    return [float('nan')] * len(completions)\n", "f"),
    ("that returns infinity", "def f(completions, **kw):\n    return [float('inf')] * len(completions)\n", "f"),
    ("that returns 1e39", "def f(completions, **kw):\n    return [1e39] * len(completions)\n", "f"),
    ("without any opinion", "def f(completions, **kw):\n    return [None] * len(completions)\n", "f"),
    ("that returns dicts", "def f(completions, **kw):\n    return [{}] * len(completions)\n", "f"),
):
    for command in ("recipes/ppo", "recipes/rloo"):
        if command == "recipes/ppo" or name in ("that raises", "that returns NaN", "that returns too few",
                                                "with a syntax error", "that exits"):  # fmt: skip
            add("rewards", name, command, "--reward_funcs bad.f", *says, files={"bad.py": source}, mend={"bad.py":
                "def f(completions, **kw):\n    return [1.0] * len(completions)\n"}, right="--reward_funcs bad.f",
                finish=name in ("that raises", "with a syntax error"))  # fmt: skip
for name in ("os.system", "builtins.print", "no_such_module.f", "bad", "a..b"):
    add("rewards", name, "recipes/ppo", f"--reward_funcs {name}", "--reward_funcs", name)
add("rewards", "no reward", "recipes/collect", "--labeler reward --reward_funcs no.such", "--reward_funcs", "no.such")

JUDGED = "--reward_funcs judge --judge_model_name_or_path made/lm"
RUBRIC = "rubric.yaml"
NEEDY = "def f(completions, answer):\n    return [1.0 for _ in completions]\n"
for name, command, wrong, *says in (
    ("a principle without a judge", "recipes/ppo", "--principle 'Be kind.'", "--principle", "--reward_funcs judge"),
    ("a principle without a judge", "recipes/collect", "--principle 'Be kind.'", "--principle", "--labeler judge"),
    ("a principle without a judge", "eval/compare", "--principle 'Be kind.'", "--principle", "--judges"),
    ("a judge's address without one", "recipes/rloo", "--judge_base_url http://127.0.0.1:1/v1", "--judge_base_url"),
    ("rewards of no labeler", "recipes/collect", "--labeler simulated", "--reward_funcs rewards.length: scores nothing",
     "Add --labeler reward"),
    ("rewards of no judge", "eval/compare", "--judges human", "--reward_funcs rewards.length: scores nothing",
     "Add reward to --judges"),
    ("rewards of no default judge", "eval/compare", "--judges - --dataset_name starter",
     "--reward_funcs rewards.length: scores nothing", "Add reward to --judges"),
    ("noise of no labeler", "recipes/collect", "--labeler_temperature 0.5", "--labeler_temperature 0.5: is the simul"),
    ("a function that needs a column", "recipes/collect", "--reward_funcs needy.f",
     "--reward_funcs needy.f: needs the argument 'answer'"),
    ("a function that needs a column", "eval/compare", "--reward_funcs needy.f",
     "--reward_funcs needy.f: needs the argument 'answer'"),
    ("a function that needs a column", "eval/front", "--reward_funcs starter needy.f",
     "--reward_funcs needy.f: needs the argument 'answer'"),
    ("a function that needs a column", "eval/few_shot", "--reward_funcs needy.f",
     "--reward_funcs needy.f: needs the argument 'answer'"),
    ("a function that needs a column", "eval/overoptimization", "--reward_funcs starter --eval_reward_funcs needy.f",
     "--eval_reward_funcs needy.f: needs the argument 'answer'"),
    ("a principle without a judge", "eval/front", "--principle 'Be kind.'", "--principle", "--reward_funcs judge"),
    ("a principle without a judge", "eval/few_shot", "--principle 'Be kind.'", "--principle", "--reward_funcs judge"),
    ("an empty principle", "eval/front", "--reward_funcs starter judge --judge_model_name_or_path made/lm "
     "--principle ''", "--principle: is empty"),
    ("an empty principle", "eval/few_shot", f"{JUDGED} --principle ''", "--principle: is empty"),
    ("an empty principle", "recipes/ppo", f"{JUDGED} --principle ' '", "--principle"),
    ("an empty principle", "recipes/collect", "--reward_funcs - --labeler judge --principle ''",
     "--principle"),
    ("a principle and a rubric", "recipes/ppo", f"{JUDGED} --principle x --rubric {RUBRIC}", "--principle and"),
    ("a missing rubric", "recipes/ppo", f"{JUDGED} --rubric gone.yaml", "--rubric gone.yaml"),
    ("a missing judge", "recipes/rloo", "--reward_funcs judge --judge_model_name_or_path ./gone",
     "--judge_model_name_or_path ./gone"),
    ("a reward model as a judge", "recipes/ppo", "--reward_funcs judge --judge_model_name_or_path made/rm",
     "--judge_model_name_or_path made/rm"),
    ("a judge that writes nothing", "recipes/ppo", f"{JUDGED} --judge_max_new_tokens 99", "--judge_max_new_tokens"),
    ("a judge's server that isn't there", "recipes/ppo", "--reward_funcs judge --judge_base_url http://127.0.0.1:1/v1",
     "--judge_base_url http://127.0.0.1:1/v1", "Connection refused"),
    ("a judge's server that isn't there", "recipes/collect",
     "--reward_funcs - --labeler judge --judge_base_url http://127.0.0.1:1/v1", 
     "--judge_base_url http://127.0.0.1:1/v1", "Connection refused"),
    ("no address", "recipes/ppo", "--reward_funcs judge --judge_base_url 127.0.0.1:8000", "--judge_base_url 127.0.0.1"),
    ("a key in the address", "recipes/ppo", "--reward_funcs judge --judge_base_url http://me:secret@127.0.0.1:1/v1",
     "--judge_base_url: has more", "OPENAI_API_KEY"),
):  # fmt: skip
    add("rewards", name, command, wrong, *says, right="",
        files={RUBRIC: "kind: It is kind.\n", "needy.py": NEEDY})  # fmt: skip
for name, content, word in (
    ("of a list", "- kind\n", "is no mapping"),
    ("of a wrong weight", "kind: {text: It is kind., weight: much}\n", "kind: a weight"),
    ("of an unknown key", "kind: {text: It is kind., points: 2}\n", "kind: needs a text"),
    ("of bytes", b"\xff\xfe\x00kind", "can't be read"),
):
    add(
        "rewards",
        f"a rubric {name}",
        "recipes/ppo",
        f"{JUDGED} --rubric {RUBRIC}",
        f"--rubric {RUBRIC}",
        word,
        files={RUBRIC: content},
        mend={RUBRIC: "kind: It is kind.\n"},
        right=f"{JUDGED} --rubric {RUBRIC}",
    )
add("numbers", "judge_max_new_tokens=0", "recipes/ppo", "--judge_max_new_tokens 0", "--judge_max_new_tokens 0",
    "must be", early=True)  # fmt: skip

# ------------------------------------------------------------------------------- configurations of stages

STAGES = (
    ("recipes/star", "sft_config"), ("recipes/scaling", "base_config"), ("recipes/rounds", "ppo_config"),
    ("recipes/rounds", "collect_config"), ("recipes/rounds", "reward_config"), ("recipes/rounds", "compare_config"),
)  # fmt: skip
for command, flag in STAGES:
    number = {"compare_config": "best_of_n", "collect_config": "num_generations"}.get(flag, "weight_decay")
    for name, content, *says in (
        ("not YAML", "a: [\n", "not readable as YAML"),
        ("a list", "- a\n", "flag: value"),
        ("an unknown key", "speed: 3\n", "unknown key 'speed'"),
        ("a wrong type", f"{number}: [a]\n", number),
        ("out of range", f"{number}: -7\n", f"{number} -7: must be"),
        ("bytes", b"\xff\xfe", "not readable as YAML"),
    ):
        add("stages", f"{flag}: {name}", command, f"--{flag} c.yaml", f"--{flag}", "c.yaml", *says,
            files={"c.yaml": content})  # fmt: skip
for name, command, flag, content, *says in (
    ("a missing file", "recipes/rounds", "ppo_config", "ptx_dataset_name: ./gone.jsonl\n", "./gone.jsonl"),
    ("a missing model", "recipes/rounds", "collect_config", "labeler: reward\nreward_funcs: [./gone]\n", "./gone"),
    ("a key that the sweep sets", "recipes/scaling", "base_config", "hidden_size: 8\n", "hidden_size"),
    ("an unknown labeler", "recipes/rounds", "collect_config", "labeler: cat\n", "cat"),
    ("an unknown judge", "recipes/rounds", "compare_config", "judges: [cat]\n", "cat"),
    (
        "strategies that differ",
        "recipes/star",
        "sft_config",
        "load_best_model_at_end: true\n",
        "load_best_model_at_end",
    ),
    ("a plan", "recipes/rounds", "ppo_config", "plan: true\n", "plan true: trains nothing"),
    ("a plan", "recipes/star", "sft_config", "plan: true\n", "plan true: trains nothing"),
    ("batches that don't divide", "recipes/rounds", "ppo_config", "num_mini_batches: 3\n", "num_mini_batches"),
    ("an objective that isn't known", "recipes/scaling", "base_config", "objective: guess\n", "objective"),
):
    add("stages", f"{flag}: {name}", command, f"--{flag} c.yaml", f"--{flag}", *says, files={"c.yaml": content})
