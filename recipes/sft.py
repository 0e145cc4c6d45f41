"""Supervised fine-tuning: teach a language model to reply as people do.

    accelerate launch recipes/sft.py
    accelerate launch recipes/sft.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara \
        --output_dir outputs/qwen-sft --push_to_hub --hub_model_id you/qwen-sft
    accelerate launch recipes/sft.py --use_peft false --learning_rate 2e-5 --output_dir outputs/sft-full

Without arguments it reads recipes/configs/sft.yaml: the starter model and conversations, LoRA, a few minutes on a
laptop. The loss is on the assistant's replies only. Every flag of TRL's SFTConfig and ModelConfig works. An
encoder-decoder (T5, BART, ...) reads the prompt in its encoder and learns the reply in its decoder.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from trl import ModelConfig, SFTConfig, SFTTrainer

from eval.report import write_report
from rlhf.data.encoding import is_seq2seq
from rlhf.data.mixture import MixtureArguments, dataset_names, load_mixture, mix
from rlhf.data.rows import fit_max_length, sft_rows
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.models.loading import load_causal_lm
from rlhf.models.losses import fit_loss
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.report import print_plan
from rlhf.planning.supervised import plan_sft
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run
from rlhf.run.trainers import whole_checkpoints
from rlhf.tasks.seq2seq import Seq2SeqSFTTrainer, check_seq2seq_arguments


def main() -> None:
    # Arguments
    script_args, training_args, model_args, plan = parse(__file__, MixtureArguments, SFTConfig, ModelConfig, PlanConfig)
    push = take_push_request(training_args)

    # Data
    found = load_mixture(script_args, "sft")

    # Tokenizer
    trust = training_args.trust_remote_code
    source = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(
        source,
        eos_token=training_args.eos_token,
        pad_token=training_args.pad_token,
        chat_template_path=training_args.chat_template_path,
    )
    seq2seq = is_seq2seq(tokenizer)
    if seq2seq:
        check_seq2seq_arguments(training_args)
    context = context_length(source)
    fit_max_length(training_args, context)
    limits = (training_args, context)
    train, test = mix(script_args, found, lambda rows, name: sft_rows(rows, name, tokenizer, *limits))
    if plan.plan:
        return print_plan(plan_sft(plan, training_args, model_args, source, train))
    if not start_run(__file__, training_args.output_dir, script_args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)

    # Model
    model = load_causal_lm(source, model_args, tokenizer)

    # Trainer
    fit_loss(training_args, model)
    training_args.assistant_only_loss, training_args.dataset_text_field = False, "text"  # applied to the rows
    trainer = whole_checkpoints(Seq2SeqSFTTrainer if seq2seq else SFTTrainer)(
        model=model, args=training_args, train_dataset=train, eval_dataset=test, processing_class=tokenizer
    )

    # Train
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    metrics = trainer.evaluate()
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
        datasets=dataset_names(script_args),
        metrics={"held-out loss per reply token": metrics["eval_loss"]},
        repo_id=push and push.repo_id,
    )
    finish_run(training_args.output_dir, metrics)
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
