"""Pretraining: train a new language model on text.

    accelerate launch recipes/pretrain.py
    accelerate launch recipes/pretrain.py --model_type gpt2 --hidden_size 768 --num_hidden_layers 12 \
        --num_attention_heads 12 --dataset_name roneneldan/TinyStories --output_dir outputs/stories
    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_masked.yaml
    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_replaced.yaml
    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_span.yaml

Without arguments it reads recipes/configs/pretrain.yaml: a causal model on the starter conversations with the tokenizer
of recipes/tokenizer.py, ten minutes on a laptop. --objective is causal (GPT), masked (BERT), replaced (ELECTRA) or span
(T5). Any --model_type of transformers with a head for it works. The model can be the --model_name_or_path of sft.py,
reward.py and ppo.py. Every flag of transformers' TrainingArguments works.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from eval.measuring.pretraining import held_out_metrics, metrics_of_choices
from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import texts_of
from rlhf.errors import report_errors
from rlhf.hub import prepare_repo, push_model, take_push_request, write_card
from rlhf.pretraining.config import NewModelConfig, PretrainingConfig, check_pretraining, check_special_tokens
from rlhf.pretraining.model import new_config, new_model
from rlhf.pretraining.rows import pretraining_rows
from rlhf.pretraining.tokenization import frame, resolve_tokenizer
from rlhf.pretraining.trainer import PretrainingTrainer, choices_of, pretraining_collator, pretraining_metrics
from rlhf.run.checkpoints import last_checkpoint
from rlhf.run.folders import finish_run, start_run


def main() -> None:
    # Arguments
    script_args, training_args, model_args = parse(__file__, DatasetArguments, PretrainingConfig, NewModelConfig)
    check_pretraining(training_args, model_args)
    push = take_push_request(training_args)

    # Data
    train, test = load_splits(script_args, "pretrain")
    train, test = texts_of(train, script_args.dataset_name), texts_of(test, script_args.dataset_name)

    # Tokenizer
    tokenizer = resolve_tokenizer(model_args.tokenizer_name)
    check_special_tokens(tokenizer, model_args.tokenizer_name, training_args)
    frame(tokenizer, training_args.objective)
    train_rows = pretraining_rows(train, tokenizer, training_args, "train")
    test_rows = pretraining_rows(test, tokenizer, training_args, "test")
    config = new_config(model_args, training_args, tokenizer)
    if not start_run(__file__, training_args.output_dir, script_args, training_args, model_args):
        return push_model(training_args.output_dir, push)
    prepare_repo(push)

    # Model
    model = new_model(config, training_args)

    # Trainer
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=pretraining_collator(tokenizer, training_args),
        processing_class=tokenizer,
        compute_metrics=metrics_of_choices(training_args),
        preprocess_logits_for_metrics=choices_of(training_args),
    )

    # Train
    trained = trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    metrics = trainer.evaluate() | pretraining_metrics(trainer, trained)
    metrics |= held_out_metrics(trainer, tokenizer, test, metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)

    # Save, report, card, push
    trainer.save_pretrained()
    trainer.save_state()
    write_report(training_args.output_dir, metrics)
    write_card(
        training_args.output_dir,
        __file__,
        [script_args, training_args, model_args],
        source=None,
        tokenizer_name=model_args.tokenizer_name,
        datasets=[script_args.dataset_name],
        metrics={
            name: value for name, value in metrics.items() if not name.endswith(("runtime", "second", "epoch", "seen"))
        },
        repo_id=push and push.repo_id,
    )
    finish_run(training_args.output_dir, metrics)
    push_model(training_args.output_dir, push)


if __name__ == "__main__":
    with report_errors():
        main()
