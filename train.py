"""Trains the fusion (and LoRA, or more of the LLM) of a VoxKrikri on pairs of speech and text.

    python train.py recipes/mini/fusion.yaml
    python train.py recipes/mini/fusion.yaml training.learning_rate=5e-4 data.target=hypothesis   # overrides

A recipe has four parts: `model` (backbones and fusion, or `init_from`), `data`, `prepared` (where hypotheses and
states go: Whisper is frozen, so it listens to each clip once) and `training` (transformers' TrainingArguments).
Started again on the same output folder, it goes on where it was stopped.
"""

import argparse
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path

import datasets
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, Trainer, TrainingArguments, WhisperFeatureExtractor, WhisperTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from metrics.greek_wer.greek_wer import word_error_rate
from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor
from voxkrikri.processing_voxkrikri import load_audio


CLIPS_PER_SHARD = 500
TRAINED_WEIGHTS = "trained.safetensors"


@dataclass
class Source:
    """Clips and transcripts: a manifest (`path` to .jsonl, .csv or .parquet) or a dataset on the Hub."""

    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    audio: str = "audio"
    text: str = "text"
    repeat: int = 1


@dataclass
class Data:
    train: list[Source]
    validation: Source
    task: str = "fusion"  # or "correction": the hypothesis is the prompt and no states are heard, for comparison
    target: str = "reference"  # or "hypothesis": a first stage that learns to spell out what the states say
    language: str | None = None
    input_noise: float = 0.0  # share of the input text tokens taken from the hypothesis instead
    fusion_modes: list[str] = field(default_factory=lambda: ["full", "causal"])  # one drawn for every batch
    listen_batch_size: int = 16


@dataclass
class Recipe:
    """What a YAML file holds. `model` has `speech`, `text` and the fusion's settings, or `init_from` alone."""

    model: dict
    data: Data
    training: dict
    prepared: str = "data/prepared"
    learning_rates: dict[str, float] = field(default_factory=dict)  # of "fusion" and "text", where they differ


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe with `part.key=value` overrides applied; values are YAML.

    Raises:
        ValueError: for a key that no recipe has, an override without "=", or a data source of neither kind.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override is part.key=value, got {override!r}")
        *parents, key = name.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = yaml.safe_load(value)

    def build(kind: type, values: dict, where: str):
        unknown = sorted(set(values) - {known.name for known in fields(kind)})
        if unknown:
            known = ", ".join(known.name for known in fields(kind))
            raise ValueError(f"{path}: {where} has no {unknown[0]!r}; it knows {known}")
        return kind(**values)

    def build_source(values: dict, where: str) -> Source:
        source = build(Source, values, where)
        if (source.path is None) == (source.dataset is None):
            raise ValueError(f"{path}: {where} is either a path or a dataset")
        return source

    data = dict(content["data"])
    data["train"] = [build_source(source, "a source in data.train") for source in data["train"]]
    data["validation"] = build_source(data["validation"], "data.validation")
    recipe = build(Recipe, content | {"data": build(Data, data, "data")}, "the recipe")
    for name, known in (("task", ("fusion", "correction")), ("target", ("reference", "hypothesis"))):
        if getattr(recipe.data, name) not in known:
            raise ValueError(f"{path}: data.{name} is one of {known}, got {getattr(recipe.data, name)!r}")
    return recipe


def load_model(model: dict) -> tuple[VoxKrikriForConditionalGeneration, VoxKrikriProcessor]:
    """A model assembled from its backbones, or an earlier one (`init_from`), which further settings may change."""
    settings = dict(model)
    if source := settings.pop("init_from", None):
        config = VoxKrikriForConditionalGeneration.config_class.from_pretrained(source)
        unknown = sorted(name for name in settings if not hasattr(config, name))
        if unknown:
            raise ValueError(f"model.{unknown[0]} is no setting of a VoxKrikri configuration")
        config.update(settings)
        model = VoxKrikriForConditionalGeneration.from_pretrained(source, config=config)
        return model, VoxKrikriProcessor.from_pretrained(source)
    speech, text = settings.pop("speech"), settings.pop("text")
    processor = VoxKrikriProcessor(
        WhisperFeatureExtractor.from_pretrained(speech),
        AutoTokenizer.from_pretrained(text),
        WhisperTokenizer.from_pretrained(speech),
    )
    model = VoxKrikriForConditionalGeneration.from_pretrained_backbones(
        speech, text, tokenizer=processor.tokenizer, speech_tokenizer=processor.speech_tokenizer, **settings
    )
    return model, processor


def load_source(source: Source) -> datasets.Dataset:
    """Rows of `audio` (a path, or a dict of bytes and path) and `text`; audio is decoded by the processor alone."""
    if source.dataset is not None:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision
        ).cast_column(source.audio, datasets.Audio(decode=False))
    else:
        kind = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source.path).suffix)
        if kind is None:
            raise ValueError(f"a manifest is .jsonl, .csv or .parquet, got {source.path}")
        rows = datasets.load_dataset(kind, data_files=source.path, split="train")
    missing = [column for column in (source.audio, source.text) if column not in rows.column_names]
    if missing:
        raise ValueError(f"{source.path or source.dataset} has no column {missing[0]!r}, only {rows.column_names}")
    rows = rows.select_columns([source.audio, source.text])
    rows = rows.rename_columns(
        {old: new for old, new in ((source.audio, "audio"), (source.text, "text")) if old != new}
    )
    if source.path is not None:
        folder = Path(source.path).parent
        rows = rows.map(lambda row: {"audio": str(folder / row["audio"]), "text": row["text"] or ""})
    return rows


class PreparedClips(Dataset):
    """Hypotheses and states of one source, in safetensors shards that Whisper wrote once, beside the transcripts."""

    def __init__(self, source: Source, data: Data, model, processor: VoxKrikriProcessor, folder: Path):
        rows = load_source(source)
        digest = sha256(repr(source).encode())
        for row in rows:
            digest.update(repr((row["audio"], row["text"])).encode())
        for parameter in model.speech_model.parameters():  # another Whisper hears something else
            digest.update(str(parameter.double().sum().item()).encode())
        name = Path(source.path).parent.name if source.path else source.dataset.replace("/", "--")
        self.folder = folder / f"{name}-{digest.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.texts, self.places, self.shards = rows["text"], [], []
        starts = range(0, len(rows), CLIPS_PER_SHARD)
        for index, start in enumerate(tqdm(starts, desc=f"listening to {name}", unit="shard")):
            path = self.folder / f"{index:05d}.safetensors"
            if not path.exists():
                part = rows.select(range(start, min(start + CLIPS_PER_SHARD, len(rows))))
                self.listen(part, data, model, processor, path)
            shard = safe_open(path, "pt")
            self.shards.append(shard)
            lengths = shard.get_tensor("state_lengths").tolist()
            first = 0
            for row, length in enumerate(lengths):
                if length:
                    self.places.append((index, start + row, first, length))
                first += length
        self.dropped = len(rows) - len(self.places)

    @staticmethod
    def listen(rows: datasets.Dataset, data: Data, model, processor: VoxKrikriProcessor, path: Path) -> None:
        """Writes one shard. A clip longer than the window gets no states: length 0."""
        states, hypotheses, lengths = [], [], []
        for start in range(0, len(rows), data.listen_batch_size):
            stop = min(start + data.listen_batch_size, len(rows))
            clips = [load_audio(row["audio"]) for row in rows.select(range(start, stop))]
            fits = [len(clip) <= processor.feature_extractor.n_samples for clip in clips]
            heard = iter(())
            if any(fits):
                batch = [clip for clip, fit in zip(clips, fits, strict=True) if fit]
                features = processor(audio=batch, sampling_rate=16_000).input_features
                audio = model.listen(features, data.language)
                heard = zip(audio.audio_states, audio.hypothesis_ids, audio.state_lengths.tolist(), strict=True)
            for fit in fits:
                if fit:
                    clip_states, ids, length = next(heard)
                    states.append(clip_states[:length].to("cpu", torch.bfloat16))
                    hypotheses.append(torch.nn.functional.pad(ids[: length - 1].cpu(), (0, 1), value=-1))
                lengths.append(length if fit else 0)
        partial = path.with_suffix(".partial")
        width = model.config.speech_config.d_model
        tensors = {
            "audio_states": torch.cat(states) if states else torch.zeros(0, width, dtype=torch.bfloat16),
            "hypothesis_ids": torch.cat(hypotheses).int() if states else torch.zeros(0, dtype=torch.int32),
            "state_lengths": torch.tensor(lengths, dtype=torch.int32),
        }
        save_file(tensors, partial)
        partial.replace(path)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        shard, row, first, length = self.places[index]
        return {
            "seed": row,
            "text": self.texts[row],
            "audio_states": self.shards[shard].get_slice("audio_states")[first : first + length].float(),
            "hypothesis_ids": self.shards[shard].get_slice("hypothesis_ids")[first : first + length - 1].long(),
        }


def correction_prompts(hypotheses: list[str]) -> list[str]:
    """What the LLM reads where it corrects text alone."""
    return [f"{hypothesis}\n" for hypothesis in hypotheses]


@torch.no_grad()
def correct(model, processor: VoxKrikriProcessor, hypotheses: list[str], **kwargs) -> list[str]:
    """Text-only correction: the LLM writes after the hypothesis and hears nothing."""
    inputs = processor(prompt=correction_prompts(hypotheses)).to(model.device)
    config = copy.deepcopy(model.generation_config)
    ids = model.language_model.generate(**inputs, generation_config=config, **kwargs)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


class Collator:
    """Items to a batch: prompt, transcript and end; states; and the mode of fusion, drawn by the batch's own content."""

    def __init__(self, processor: VoxKrikriProcessor, data: Data):
        self.processor, self.data = processor, data

    def __call__(self, items: list[dict]) -> dict:
        hypotheses = [self.processor.decode_hypothesis(item["hypothesis_ids"]) for item in items]
        targets = hypotheses if self.data.target == "hypothesis" else [item["text"] for item in items]
        if self.data.task == "correction":
            return dict(self.processor(text=targets, prompt=correction_prompts(hypotheses)))
        batch = dict(self.processor(text=targets))
        rng = random.Random(str([item["seed"] for item in items]))  # the same after a resume
        if self.data.input_noise:
            drafts = self.processor(text=hypotheses)["labels"]
            for ids, labels, draft in zip(batch["input_ids"], batch["labels"], drafts, strict=True):
                places, draft = (labels >= 0).nonzero().flatten()[:-1], draft[draft >= 0][:-1]
                for order, place in enumerate(places.tolist()):
                    if len(draft) and rng.random() < self.data.input_noise:
                        ids[place] = draft[order * len(draft) // len(places)]
        end = self.processor.speech_tokenizer.eos_token_id
        batch["fusion_mode"] = rng.choice(self.data.fusion_modes)
        batch["hypothesis_token_counts"] = torch.tensor(self.processor.hypothesis_token_counts(hypotheses))
        batch["audio_states"] = pad_sequence([item["audio_states"] for item in items], batch_first=True)
        batch["state_lengths"] = torch.tensor([len(item["audio_states"]) for item in items])
        batch["hypothesis_ids"] = pad_sequence(
            [item["hypothesis_ids"] for item in items], batch_first=True, padding_value=end
        )
        return batch


class FusionTrainer(Trainer):
    """transformers' Trainer with a learning rate a part, checkpoints of what is trained, and WER by generation."""

    def __init__(self, *args, processor: VoxKrikriProcessor, recipe: Recipe, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor, self.recipe = processor, recipe

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        parts = {"fusion": [], "text": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parts["fusion" if name.startswith("fusion.") else "text"].append(parameter)
        rates = {"fusion": self.args.learning_rate, "text": self.args.learning_rate} | self.recipe.learning_rates
        groups = [{"params": parameters, "lr": rates[part]} for part, parameters in parts.items() if parameters]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(self.args.adam_beta1, self.args.adam_beta2), weight_decay=self.args.weight_decay
        )
        return self.optimizer

    def transcribe(self, clips: PreparedClips, hypotheses: list[str], fusion_mode: str) -> Iterator[str]:
        model = self.model.eval()
        for start in range(0, len(clips), self.args.per_device_eval_batch_size):
            stop = min(start + self.args.per_device_eval_batch_size, len(clips))
            if self.recipe.data.task == "correction":
                with self.compute_loss_context_manager():
                    texts = correct(model, self.processor, hypotheses[start:stop])
                yield from texts
                continue
            batch = self.data_collator([clips[index] for index in range(start, stop)])
            names = ("audio_states", "state_lengths", "hypothesis_ids", "hypothesis_token_counts")
            audio = {name: batch[name].to(model.device) for name in names}
            longest = 2 * int(batch["hypothesis_token_counts"].max()) + 16  # an untrained model may never stop
            with self.compute_loss_context_manager():
                ids = model.generate(fusion_mode=fusion_mode, max_new_tokens=longest, **audio)
            yield from self.processor.batch_decode(ids)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Word error rates of the hypotheses and of the fused text, in every mode that is trained."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        clips = self.eval_dataset if eval_dataset is None else eval_dataset
        references = [clips.texts[place[1]] for place in clips.places]
        heard = [self.processor.decode_hypothesis(clips[index]["hypothesis_ids"]) for index in range(len(clips))]
        rates = {"wer_hypothesis": word_error_rate(references, heard)}
        for mode in self.recipe.data.fusion_modes:
            rates[f"wer_{mode}"] = word_error_rate(references, list(self.transcribe(clips, heard, mode)))
        rates["wer"] = min(rates[f"wer_{mode}"] for mode in self.recipe.data.fusion_modes)
        rates = {f"{metric_key_prefix}_{name}": value for name, value in rates.items()}
        self.log(rates)
        return metrics | rates

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.trained_state_dict(), folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / TRAINED_WEIGHTS), strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="part.key=value, such as training.max_steps=100")
    arguments = parser.parse_args(argv)
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    args = TrainingArguments(
        **{"report_to": "none", "remove_unused_columns": False, "label_names": ["labels"]} | recipe.training
    )
    output = Path(args.output_dir)
    if (output / "voxkrikri.py").exists():
        raise ValueError(f"{output} is the project's own root: train into a folder of its own")
    set_seed(args.seed)
    model, processor = load_model(recipe.model)
    model.eval().to(args.device)

    def prepare(source: Source) -> PreparedClips:
        return PreparedClips(source, recipe.data, model, processor, Path(recipe.prepared))

    train = ConcatDataset([clips for source in recipe.data.train for clips in [prepare(source)] * source.repeat])
    validation = prepare(recipe.data.validation)
    model.freeze_backbones()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in bfloat16 small updates would be rounded away
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(train)} clips; training {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters")
    trainer = FusionTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=Collator(processor, recipe.data),
        processor=processor,
        recipe=recipe,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.exists() else None)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    metrics = trainer.evaluate()
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
