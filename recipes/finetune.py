"""Fine-tuning with labels, as in GPT-1 and BERT: sentences, sentence pairs, tags of words, or answer spans.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py --dataset_config spans --output_dir outputs/finetune-spans
    accelerate launch recipes/finetune.py --model_name_or_path outputs/pretrain --use_peft false --lm_coef 0.5 \
        --dataset_config question --max_train_samples 300 --output_dir outputs/finetune-question
    accelerate launch recipes/finetune.py --model_name_or_path bert-base-uncased --dataset_name conll2003.jsonl \
        --use_peft false --learning_rate 5e-5 --output_dir outputs/finetune-tags

Without arguments it reads recipes/configs/finetune.yaml: the starter model with LoRA learns which of two replies
follows a message. The columns determine the kind of task (table: rlhf/tasks/labelled.py). LoRA is the default.
--use_peft false trains the whole model, --freeze_body true the head only, and --from_scratch true the same network from
random weights. --lm_coef adds GPT-1's auxiliary objective. Every flag of TrainingArguments and ModelConfig works.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from transformers import TrainingArguments
from trl import ModelConfig

from eval.measuring.held_out import evaluate_finetuned
from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.models.sources import resolve
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run
from rlhf.tasks.finetuning import (
    FinetuneArguments,
    FinetuningTrainer,
    check_arguments,
    finetuning_config,
    language_model_head,
    load_finetuning_model,
    load_options,
    share_right,
)
from rlhf.tasks.labelled import LABEL_KINDS, read_task
from rlhf.tasks.labelled_rows import data_collator, finetuning_rows, load_reading_tokenizer


def main() -> None:
    # Arguments
    script_args, args, training_args, model_args = parse(
        __file__, DatasetArguments, FinetuneArguments, TrainingArguments, ModelConfig
    )
    push = take_push_request(training_args)

    # Data
    train, test = load_splits(script_args, "finetune")
    task = read_task(train, test, script_args.dataset_name)

    # Tokenizer
    source = resolve(
        model_args.model_name_or_path, revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code, weights=not args.from_scratch,
    )  # fmt: skip
    config = finetuning_config(source, task)
    check_arguments(args, model_args.use_peft, source, config, task)
    tokenizer = load_reading_tokenizer(source, config, args.pad_token)
    few = task.train.shuffle(seed=training_args.seed).select(range(args.max_train_samples or len(task.train)))
    train = finetuning_rows(few, task, tokenizer, args.max_length, "training")
    test = finetuning_rows(task.test, task, tokenizer, args.max_length, "test")
    if not start_run(__file__, training_args.output_dir, script_args, args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)

    # Model
    model = load_finetuning_model(source, config, task, args, model_args, tokenizer)

    # Trainer
    trainer = FinetuningTrainer(
        model=model, args=training_args, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
        data_collator=data_collator(task, tokenizer), compute_metrics=share_right, lm_coef=args.lm_coef,
        lm_head=language_model_head(source, config, model) if args.lm_coef else None,
    )  # fmt: skip

    # Train
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    result = evaluate_finetuned(trainer, task, test)
    measured = {f"held-out {name}": f"{cell:.3f}" for name, cell in result.metrics.items()}
    metrics = {"eval_loss": result.loss, **{name: cell.mean for name, cell in result.metrics.items()}}

    # Save, report, card, push
    trainer.save_model()
    trainer.save_state()
    write_report(training_args.output_dir, metrics)
    write_card(
        training_args.output_dir,
        __file__,
        [script_args, args, training_args, model_args],
        source=source,
        datasets=[script_args.dataset_name],
        metrics=measured,
        repo_id=push and push.repo_id,
        auto_class=LABEL_KINDS[task.kind].auto_class.__name__,
        load_options=load_options(task, config),
    )
    finish_run(training_args.output_dir, metrics)
    print(", ".join(f"{name} {value}" for name, value in measured.items()))
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
