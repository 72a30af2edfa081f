"""Trains the mini's Whisper from nothing on the clips of `speak`, with a CTC loss on the encoder beside its own.

    python -m recipes.mini.speech_model --train data/speech --validation data/validation \\
        --tokenizer data/vocabularies/speech --out runs/speech

* transformers' Seq2SeqTrainer runs it: started again on the same --out it goes on from the last checkpoint.
* CTC over letters makes the encoder find the text within the audio long before cross-attention would; its head is
  dropped. (Over the 1,000 pieces of the vocabulary it had not left the all-blank plateau after 1,500 steps.)
* `--init runs/speech` trains an earlier result further, on other clips (row 2 of the table of results).
"""

import argparse
import json
from bisect import bisect_right
from math import ceil
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_utils import get_last_checkpoint


WINDOW = 10  # seconds; longer clips are left out
HOP = 320  # samples, 20 ms: half of Whisper's frames are enough for these voices, and a step takes a third of the time
HIDDEN, ENCODER_LAYERS, DECODER_LAYERS, HEADS = 192, 4, 2, 3
CTC_WEIGHT = 0.3
WRONG_SHARE = 0.2
PACKED_SHARE = 0.6
LONGEST_TEXT = 128  # tokens of the decoder, its prefix and the end among them


class WhisperWithCTC(WhisperForConditionalGeneration):
    """Whisper whose loss is (1 - w) of its own and w of a CTC loss on its encoder, w = CTC_WEIGHT."""

    def __init__(self, config: WhisperConfig, letters: str):
        super().__init__(config)
        self.ctc_head = torch.nn.Linear(config.d_model, len(letters) + 1)  # the last class is the blank
        self.post_init()
        for conv in (self.model.encoder.conv1, self.model.encoder.conv2):
            torch.nn.init.kaiming_normal_(conv.weight)  # else the sinusoids of the positions drown the audio at first
        for module in (self.model.encoder, *self.model.encoder.layers):
            module.dropout = 0.0  # noise and masking regularise the encoder; on a CPU the draws cost a tenth of a step
        self.set_attn_implementation("eager")  # with bf16 on a CPU, a quarter faster than SDPA's backward

    def forward(self, input_features=None, labels=None, letters=None, **kwargs):
        """letters: `(batch, longest)` indices of letters, padded with -1."""
        if self.training:
            # The decoder would rather learn its few sentences by heart than listen: part of what it reads is wrong.
            read = shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
            wrong = (torch.rand(read.shape, device=read.device) < WRONG_SHARE) & (read < self.config.eos_token_id)
            kwargs["decoder_input_ids"] = torch.where(wrong, torch.randint_like(read, self.config.eos_token_id), read)
        output = super().forward(input_features=input_features, labels=labels, **kwargs)
        if letters is not None and output.loss is not None:
            log_probs = self.ctc_head(output.encoder_last_hidden_state).float().log_softmax(-1)
            ctc = F.ctc_loss(
                log_probs.transpose(0, 1),
                letters.clamp(min=0),
                torch.full((len(letters),), log_probs.shape[1]),
                (letters >= 0).sum(1),
                blank=log_probs.shape[2] - 1,
                zero_infinity=True,
            )
            output.loss = (1 - CTC_WEIGHT) * output.loss + CTC_WEIGHT * ctc
        return output


def build_config(tokenizer: WhisperTokenizer) -> WhisperConfig:
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    return WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=HIDDEN,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * HIDDEN,
        decoder_ffn_dim=4 * HIDDEN,
        num_mel_bins=80,
        max_source_positions=WINDOW * 16_000 // HOP // 2,  # the second convolution halves
        max_target_positions=LONGEST_TEXT,
        dropout=0.1,
        init_std=0.04,
        apply_spec_augment=True,
        mask_time_prob=0.05,
        mask_time_length=10,
        mask_feature_prob=0.05,
        mask_feature_length=8,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def build_generation_config(config: WhisperConfig, tokenizer: WhisperTokenizer) -> GenerationConfig:
    """What Whisper's own checkpoints carry: ids of languages and tasks, and the heads whose attention tells time."""
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|el|>": tokenizer.convert_tokens_to_ids("<|el|>")},
        task_to_id={task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("translate", "transcribe")},
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        alignment_heads=[[DECODER_LAYERS - 1, head] for head in range(HEADS)],
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=config.max_target_positions,
        language="el",
        task="transcribe",
        return_timestamps=False,
    )


class Clips(torch.utils.data.Dataset):
    """The clips of one or more `speak` folders; log-mel features are made once and kept beside the manifest.

    A share `packed` of the windows holds a second clip, drawn among those that still fit: less silence to compute, and
    sentences in new company are harder to learn by heart.
    """

    def __init__(
        self,
        folders: list[Path],
        extractor: WhisperFeatureExtractor,
        tokenizer: WhisperTokenizer,
        letters: str,
        packed: float = 0.0,
    ):
        self.items, self.tokenizer, self.letters, self.packed = [], tokenizer, letters, packed
        for folder in folders:
            entries = [json.loads(line) for line in (folder / "manifest.jsonl").open(encoding="utf-8")]
            features = self.load_features(folder, entries, extractor)
            self.items += [
                (
                    features[index],
                    ceil(entry["duration"] * extractor.sampling_rate / extractor.hop_length),
                    entry["text"],
                )
                for index, entry in enumerate(entries)
                if entry["duration"] <= extractor.chunk_length
            ]
        self.items.sort(key=lambda item: item[1])

    @staticmethod
    def load_features(folder: Path, entries: list[dict], extractor: WhisperFeatureExtractor) -> np.ndarray:
        """Features (clips, mel bins, frames) as float16, mapped from disk."""
        path = folder / f"features_{extractor.feature_size}x{extractor.nb_max_frames}.npy"
        if not path.exists():
            shape = (len(entries), extractor.feature_size, extractor.nb_max_frames)
            partial = path.with_suffix(".partial.npy")
            features = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            for first in tqdm(range(0, len(entries), 64), desc=f"features of {folder}"):
                batch = [soundfile.read(folder / e["audio"], dtype="float32")[0] for e in entries[first : first + 64]]
                features[first : first + len(batch)] = extractor(batch, sampling_rate=16_000).input_features
            features.flush()
            partial.replace(path)
        return np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        features, frames, text = self.items[index]
        fitting = bisect_right(self.items, features.shape[1] - frames, key=lambda item: item[1])
        labels = self.tokenizer(text).input_ids[1:]  # decoder_start_token_id comes before the labels by itself
        if fitting and torch.rand(()) < self.packed:
            second, _, second_text = self.items[torch.randint(fitting, ())]
            both = f"{text} {second_text}".strip()
            both_labels = self.tokenizer(both).input_ids[1:]
            if len(both_labels) <= LONGEST_TEXT:
                features = np.concatenate([features[:, :frames], second[:, : features.shape[1] - frames]], axis=1)
                text, labels = both, both_labels
        letters = [self.letters.index(letter) for letter in text.lower().replace("ς", "σ") if letter in self.letters]
        return {
            "input_features": torch.from_numpy(features.astype(np.float32)),
            "labels": torch.tensor(labels),
            "letters": torch.tensor(letters, dtype=torch.long),
        }


def letters_of(folders: list[Path]) -> str:
    """What CTC spells: the letters of all transcripts, since neither spaces nor punctuation can be heard."""
    texts = [
        json.loads(line)["text"] for folder in folders for line in (folder / "manifest.jsonl").open(encoding="utf-8")
    ]
    return "".join(sorted({letter for text in texts for letter in text.lower().replace("ς", "σ") if letter.isalpha()}))


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.stack([item["input_features"] for item in items]),
        "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
        "letters": pad_sequence([item["letters"] for item in items], batch_first=True, padding_value=-1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="folders made by recipes.mini.speak")
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of the vocabulary of a new Whisper")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", help="folder or Hub id of a Whisper to train further instead of a new one")
    parser.add_argument("--language", default="el", help="of the speech; needs --init where it is not Greek")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=1000)
    args = parser.parse_args(argv)
    if (args.init is None) == (args.tokenizer is None):
        parser.error("give --tokenizer for a new Whisper, or --init to train one further")
    if args.init is None and args.language != "el":
        parser.error("a new Whisper is Greek: give --init to train one further in another language")

    torch.manual_seed(0)
    letters = letters_of(args.train)
    if args.init is None:
        tokenizer = WhisperTokenizer.from_pretrained(args.tokenizer)
        extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW, hop_length=HOP)
        model = WhisperWithCTC(build_config(tokenizer), letters)
        model.generation_config = build_generation_config(model.config, tokenizer)
    else:
        tokenizer = WhisperTokenizer.from_pretrained(args.init, language=args.language, task="transcribe")
        extractor = WhisperFeatureExtractor.from_pretrained(args.init)
        model = WhisperWithCTC.from_pretrained(args.init, letters, dtype=torch.float32)  # the CTC head starts anew
        token = f"<|{args.language}|>"
        model.generation_config.lang_to_id[token] = tokenizer.convert_tokens_to_ids(token)
        model.generation_config.language = args.language

    def word_error_rate(prediction) -> dict[str, float]:
        texts = []
        for ids in (prediction.label_ids, prediction.predictions):
            ids = np.where(ids < 0, tokenizer.eos_token_id, ids)
            lines = tokenizer.batch_decode(ids, skip_special_tokens=True)
            texts.append([jiwer.RemovePunctuation()(line).lower().replace("ς", "σ").strip() for line in lines])
        return {"wer": jiwer.wer(*texts)}

    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=50,
            learning_rate=args.learning_rate,
            warmup_steps=min(500, args.steps // 10),
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            predict_with_generate=True,
            generation_max_length=model.config.max_target_positions,
            eval_strategy="steps",
            eval_steps=args.save_steps,
            save_steps=args.save_steps,
            save_total_limit=2,
            logging_steps=50,
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=Clips(args.train, extractor, tokenizer, letters, packed=PACKED_SHARE),
        eval_dataset=Clips([args.validation], extractor, tokenizer, letters),
        data_collator=collate,
        compute_metrics=word_error_rate,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out) if args.out.exists() else None)

    whisper = WhisperForConditionalGeneration(model.config)
    whisper.load_state_dict({name: value for name, value in model.state_dict().items() if "ctc_head" not in name})
    whisper.generation_config = model.generation_config
    whisper.config.apply_spec_augment = False
    for part in (whisper, tokenizer, extractor):
        part.save_pretrained(args.out)


if __name__ == "__main__":
    main()
