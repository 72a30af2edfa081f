"""What is learnt from a clip, and transformers' Trainer around it."""

import random
import re
import signal
import time
from collections.abc import Iterator
from math import ceil, exp
from pathlib import Path

import jiwer
import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from metrics.greek_wer.greek_wer import character_error_rate, word_error_rate
from training.data import PreparedClips, Texts
from training.recipe import Data, Recipe
from voxkrikri import VoxKrikriProcessor
from voxkrikri.modeling_voxkrikri import positions_from_labels


TRAINED_WEIGHTS = "trained.safetensors"


def correction_prompts(hypotheses: list[str]) -> list[str]:
    """What the LLM reads where it corrects text alone; the states are zeros then, whose keys and values add nothing."""
    return [f"{hypothesis}\n" for hypothesis in hypotheses]


def reference_prefix(reference: str, hypothesis: str, words: int) -> str:
    """The reference's words up to the last that the hypothesis's first `words` stand for, by edit distance."""
    if not reference.split() or not hypothesis.split():
        return ""
    count = 0
    for chunk in jiwer.process_words(reference.lower(), hypothesis.lower()).alignments[0]:
        heard = min(chunk.hyp_end_idx, words) - chunk.hyp_start_idx
        if chunk.type in ("equal", "substitute") and heard > 0:
            count = chunk.ref_start_idx + heard
    return " ".join(reference.split()[:count])


class Collator:
    """Items to a batch: prompt, transcript and end; states; and the mode of fusion, drawn by the batch's own content."""

    def __init__(self, processor: VoxKrikriProcessor, data: Data):
        self.processor, self.data = processor, data

    def cut(self, item: dict, rng: random.Random) -> dict:
        """The item as a stream has it when some of its hypothesis is there: fewer states, a part of the text, no end."""
        tokens = rng.randrange(1, max(2, len(item["hypothesis_ids"])))
        ids = item["hypothesis_ids"][:tokens]
        hypothesis = self.processor.decode_hypothesis(item["hypothesis_ids"])
        heard = self.processor.decode_hypothesis(ids).split()
        if heard and heard[-1] != hypothesis.split()[len(heard) - 1]:
            heard.pop()  # half a word
        text = reference_prefix(item["text"], hypothesis, len(heard))
        if not text:
            return item
        return item | {"text": text, "hypothesis_ids": ids, "audio_states": item["audio_states"][:tokens], "cut": True}

    def __call__(self, items: list[dict]) -> dict:
        if any("input_features" in item for item in items):
            return {"live_clips": items}  # the trainer has Whisper listen, and comes back
        rng = random.Random(str([item["seed"] for item in items]))  # the same after a resume
        items = [
            self.cut(item, rng) if rng.random() < self.data.prefix_share and "audio_states" in item else item
            for item in items
        ]
        heard = [item for item in items if "audio_states" in item]
        if not heard:
            batch = dict(self.processor(text=[item["text"] for item in items], prompt=[i["prompt"] for i in items]))
            return batch | self.loss_options
        nothing = {
            "audio_states": torch.zeros_like(heard[0]["audio_states"][:1]),
            "hypothesis_ids": heard[0]["hypothesis_ids"][:0],
        }
        alone = torch.tensor(["audio_states" not in item for item in items])
        items = [nothing | item for item in items]
        hypotheses = [self.processor.decode_hypothesis(item["hypothesis_ids"]) for item in items]
        targets = [
            hypothesis if self.data.target == "hypothesis" and not text_alone else item["text"]
            for item, hypothesis, text_alone in zip(items, hypotheses, alone, strict=True)
        ]
        correction = self.data.task == "correction"
        prompts = correction_prompts(hypotheses) if correction else [item["prompt"] for item in items]
        batch = dict(self.processor(text=targets, prompt=prompts))
        for item, labels in zip(items, batch["labels"], strict=True):
            if item.get("cut"):
                labels[(labels >= 0).nonzero()[-1]] = -100  # the end is not there yet
        if self.data.input_noise:
            drafts = self.processor(text=hypotheses)["labels"]
            for ids, labels, draft in zip(batch["input_ids"], batch["labels"], drafts, strict=True):
                places, draft = (labels >= 0).nonzero().flatten()[:-1], draft[draft >= 0][:-1]
                for order, place in enumerate(places.tolist()):
                    if len(draft) and rng.random() < self.data.input_noise:
                        ids[place] = draft[order * len(draft) // len(places)]
        end = self.processor.speech_tokenizer.eos_token_id
        batch["fusion_mode"] = rng.choice(self.data.fusion_modes)
        counts = torch.tensor(self.processor.hypothesis_token_counts(hypotheses))
        jitter = torch.tensor([1 + rng.uniform(-1, 1) * self.data.ratio_jitter for _ in items])
        batch["hypothesis_token_counts"] = (counts * jitter).round().long().clamp(min=1)
        states = [item["audio_states"] * (not correction) for item in items]
        batch["audio_states"] = pad_sequence(states, batch_first=True)
        batch["state_lengths"] = torch.tensor([len(item["audio_states"]) for item in items])
        batch["hypothesis_ids"] = pad_sequence(
            [item["hypothesis_ids"] for item in items], batch_first=True, padding_value=end
        )
        batch["text_positions"] = positions_from_labels(batch["labels"]).masked_fill(alone[:, None], -1)
        return batch | self.loss_options

    @property
    def loss_options(self) -> dict:
        return {} if self.data.loss_chunk_size is None else {"loss_chunk_size": self.data.loss_chunk_size}


class BudgetBatches(Sampler):
    """Batches of clips of like length, as many as fit a budget of padded seconds; their order is drawn every epoch.

    Clips change places with others of their own length (rounded up), so that the number of batches stays the same.
    It is a multiple of `processes`: the first batches come twice where it would not be.
    """

    def __init__(self, seconds: list[float], budget: float, processes: int = 1, seed: int = 0):
        self.lengths = [ceil(value) for value in seconds]
        if max(self.lengths) > budget:
            raise ValueError(f"data.batch_seconds is {budget}, and the longest clip has {max(seconds):.1f} s")
        self.budget, self.processes, self.seed, self.epoch = budget, processes, seed, 0
        self.count = len(self.batches(random.Random(0)))

    def batches(self, rng: random.Random) -> list[list[int]]:
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        batches = [[]]
        for index in sorted(order, key=lambda index: self.lengths[index]):
            if self.lengths[index] * (len(batches[-1]) + 1) > self.budget:
                batches.append([])
            batches[-1].append(index)
        rng.shuffle(batches)
        return batches + batches[: -len(batches) % self.processes]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches(random.Random(f"{self.seed} {self.epoch}"))


class SaveOnSignal(TrainerCallback):
    """SIGTERM or SIGUSR1 (what a cluster sends before it takes the machine back) saves after the step, and stops.

    transformers' own way saves within a step, from where dropout would not go on exactly.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received, self.earlier = None, {}

    def receive(self, number: int, frame) -> None:
        self.received = number

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.earlier = {number: signal.signal(number, self.receive) for number in self.SIGNALS}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


class FusionTrainer(Trainer):
    """transformers' Trainer with a learning rate a part, checkpoints of what is trained, and WER by generation."""

    def __init__(self, *args, processor: VoxKrikriProcessor, recipe: Recipe, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor, self.recipe = processor, recipe
        parts = self.train_dataset.datasets
        self.seconds = [part.dataset.clips[index]["seconds"] for part in parts for index in part.indices]
        self.logged = None  # when the last loss was logged, and how many epochs were behind it
        self.add_callback(SaveOnSignal())
        whole = self.accelerator.state.fsdp_plugin.ignored_modules if self.is_fsdp_enabled else None
        for name, module in self.model.named_modules():
            if whole and re.fullmatch(whole, name) and any(p.requires_grad for p in module.parameters()):
                raise ValueError(
                    f"fsdp_ignored_modules ({whole}) leaves {name} whole, which is trained: every process would learn its "
                    "own. Take it out there; where it is the head, leave data.loss_chunk_size out too"
                )

    def get_train_dataloader(self) -> DataLoader:
        if self.recipe.data.batch_seconds is None:
            return super().get_train_dataloader()
        batches = BudgetBatches(self.seconds, self.recipe.data.batch_seconds, self.args.world_size, self.args.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """The batch on its device; where Whisper has not listened yet, it does now."""
        if items := inputs.pop("live_clips", None):
            clips = [item for item in items if "input_features" in item]
            features = torch.stack([clip.pop("input_features") for clip in clips])
            heard = self.model.listen(features, self.recipe.data.language, **self.recipe.data.hypothesis_options)
            for clip, states, ids, length in zip(
                clips, heard.audio_states, heard.hypothesis_ids, heard.state_lengths.tolist(), strict=True
            ):
                clip |= {"audio_states": states[:length].float().cpu(), "hypothesis_ids": ids[: length - 1].cpu()}
            inputs = self.data_collator(items)
        return super()._prepare_inputs(inputs)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside every loss but the first: the hours of speech that an hour of training has taken in since the last."""
        if "loss" in logs:
            now = time.perf_counter(), self.state.epoch
            if self.logged is not None:
                elapsed, epochs = (new - old for new, old in zip(now, self.logged, strict=True))
                logs["audio_hours_per_hour"] = round(epochs * sum(self.seconds) / elapsed, 1)
            self.logged = now
        super().log(logs, start_time)

    def transcribe(self, clips: PreparedClips, fusion_mode: str) -> Iterator[str]:
        model = self.model.eval()
        for start in range(0, len(clips), self.args.per_device_eval_batch_size):
            stop = min(start + self.args.per_device_eval_batch_size, len(clips))
            hypotheses = [clip["hypothesis"] for clip in clips.clips[start:stop]]
            correction = self.recipe.data.task == "correction"
            prompts = correction_prompts(hypotheses) if correction else [clips.prompt] * (stop - start)
            batch = self.data_collator([clips[index] for index in range(start, stop)])
            names = ("audio_states", "state_lengths", "hypothesis_ids", "hypothesis_token_counts")
            audio = {name: batch[name].to(model.device) for name in names}
            longest = 2 * int(batch["hypothesis_token_counts"].max()) + 16  # an untrained model may never stop
            audio |= self.processor(prompt=prompts).to(model.device)
            draft = self.processor.draft(hypotheses)
            with self.compute_loss_context_manager():
                ids = model.generate(fusion_mode=fusion_mode, max_new_tokens=longest, **audio, **draft)
            yield from self.processor.batch_decode(ids)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and error rates of every validation set, in every mode that is trained; of texts alone the perplexity.

        A set's own figures carry its name where there are several: `eval_fleurs_wer_full`; `eval_loss` and `eval_wer`
        are then the means of the sets.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        rates = {}
        for clips in sets:
            prefix = metric_key_prefix if len(sets) == 1 else f"{metric_key_prefix}_{clips.name}"
            rates |= super().evaluate(clips, ignore_keys, prefix)
            if isinstance(clips, Texts):
                rates[f"{prefix}_perplexity"] = exp(rates[f"{prefix}_loss"])
                continue
            references = [clip["text"] for clip in clips.clips]
            heard = [clip["hypothesis"] for clip in clips.clips]
            rates[f"{prefix}_wer_hypothesis"] = word_error_rate(references, heard)
            for mode in self.recipe.data.fusion_modes:
                texts = list(self.transcribe(clips, mode))
                rates[f"{prefix}_wer_{mode}"] = word_error_rate(references, texts)
                rates[f"{prefix}_cer_{mode}"] = character_error_rate(references, texts)
            rates[f"{prefix}_wer"] = min(rates[f"{prefix}_wer_{mode}"] for mode in self.recipe.data.fusion_modes)
        if len(sets) > 1:
            for name in ("loss", "wer"):
                known = [f"{metric_key_prefix}_{clips.name}_{name}" for clips in sets]
                values = [rates[key] for key in known if key in rates]
                if values:
                    rates[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        self.log(rates)
        self.logged = None  # evaluation is no training
        return rates

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained alone. Every process takes part: under FSDP each has a piece of every tensor."""
        weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in self.model.trained_state_dict().items()
        }
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / TRAINED_WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # transformers would save the whole LLM with them, every time
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / (OPTIMIZER_NAME if self.is_fsdp_enabled else OPTIMIZER_NAME_BIN)).exists():
            how = "without" if self.is_fsdp_enabled else "under"
            raise ValueError(
                f"{folder} was saved {how} FSDP, and its optimizer goes on only so: launch the run as before"
            )
        weights = load_file(folder / TRAINED_WEIGHTS)
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
