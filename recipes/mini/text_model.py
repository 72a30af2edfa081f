"""Trains the mini's LLM, a small Llama, on text alone.

    python -m recipes.mini.text_model --train lm_train.txt speech_train.txt --validation validation.txt \\
        --tokenizer data/vocabularies/text --out runs/text

* A line is one text between the start and the end token; what is longer than the context is cut into pieces.
* transformers' Trainer runs it, resumes it, and stops when the validation loss has turned: so little text is learnt by
  heart after a few passes.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint


HIDDEN, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 256, 6, 4, 624, 160


def build_config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_texts(paths: list[Path], tokenizer) -> list[dict[str, list[int]]]:
    """One item a line: start, tokens, end; long lines in several items of CONTEXT tokens at most."""
    items = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            ids = tokenizer(line.strip()).input_ids + [tokenizer.eos_token_id]
            items += [{"input_ids": ids[first : first + CONTEXT]} for first in range(0, len(ids), CONTEXT)]
    return [item for item in items if len(item["input_ids"]) > 2]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="text files, one text a line")
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    trainer = Trainer(
        model=LlamaForCausalLM(build_config(tokenizer)),
        args=TrainingArguments(
            output_dir=str(args.out),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=100,
            learning_rate=args.learning_rate,
            warmup_steps=100,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=read_texts(args.train, tokenizer),
        eval_dataset=read_texts([args.validation], tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if args.out.exists() else None)
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
