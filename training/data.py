"""From sources to clips with states: Whisper listens to each clip once, and what it made lies in shards.

A shard is two files named by what its clips are: `<key>.safetensors` (hypothesis ids and states, end to end) and, last
and whole, `<key>.jsonl` (a line a clip: text, seconds, hypothesis, number of states, or the problem it had). So a run
that was cut off goes on, several processes share the work, and a manifest that grows is not heard again.
"""

import csv
import json
import random
import textwrap
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate, islice
from pathlib import Path

import datasets
import soxr
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm
from transformers import WhisperFeatureExtractor

from training.recipe import Data, Source
from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor
from voxkrikri.processing_voxkrikri import SAMPLE_RATE, load_audio


CLIPS_PER_SHARD = 500
MANIFESTS = {  # what datasets calls them, and how it reads them
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
CHARACTERS_A_SECOND = 15  # of speech
LONGEST_TEXT = 600  # characters of a text alone; longer ones become several


def load_source(source: Source) -> datasets.Dataset | datasets.IterableDataset:
    """Rows of `audio` (a path, or a dict of bytes and path) and `text`; audio is decoded by the processor alone.

    Rows of texts alone keep all their columns. Where there is a column `reviewed`, rows that are not are left out.

    Raises:
        ValueError: for a manifest of another kind, with a bad line (which is named), without the columns, or of which
            nothing is reviewed.
    """
    if source.dataset is not None:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
        if not source.has_texts_alone:
            rows = rows.cast_column(source.audio, datasets.Audio(decode=False))
    else:
        if Path(source.path).suffix not in MANIFESTS:
            raise ValueError(f"a manifest is {', '.join(MANIFESTS)}, got {source.path}")
        kind, options = MANIFESTS[Path(source.path).suffix]
        if not Path(source.path).is_file():
            raise FileNotFoundError(f"there is no manifest {source.path}")
        if kind == "json":
            check_lines(Path(source.path))
        rows = datasets.load_dataset(kind, data_files=source.path, split="train", **options)
    if "reviewed" in rows.column_names:  # what a machine wrote teaches nothing until somebody has checked it
        rows = rows.filter(lambda row: str(row["reviewed"]).lower() in ("true", "1"))
        if not source.streaming and len(rows) == 0:
            raise ValueError(f"no line of {source.path or source.dataset} is reviewed: set its reviewed to true")
    needed = [source.text] if source.has_texts_alone else [source.audio, source.text]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise ValueError(f"{source.path or source.dataset} has no column {missing[0]!r}, only {rows.column_names}")
    if source.has_texts_alone:
        return rows
    rows = rows.select_columns([source.audio, source.text])
    names = {source.audio: "audio", source.text: "text"}
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def check_lines(manifest: Path) -> None:
    """Raises a ValueError with file and line for a line that is no JSON object."""
    with manifest.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{manifest}, line {number} is not JSON ({error}): mend or remove it") from error
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{manifest}, line {number} is no object with the keys of a clip: {line.strip()[:60]}"
                )


def key_of(*parts) -> str:
    """The name of a shard: the same for the same clips."""
    return sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def listen(rows: list[dict], data: Data, model, processor: VoxKrikriProcessor, path: Path) -> None:
    """Writes the shard `path` (.jsonl) and its tensors: what Whisper made of each clip, or why there is nothing."""
    clips = []
    for row in rows:
        name = row["audio"] if isinstance(row["audio"], str) else row["audio"].get("path")
        clips.append({"audio": name, "text": row["text"] or "", "seconds": 0.0, "states": 0, "problem": None})
    # A batch is decoded until its longest text ends, so texts of like length share one.
    order = sorted(range(len(rows)), key=lambda index: len(clips[index]["text"]))
    states, hypotheses = {}, {}  # by the row's place
    for start in range(0, len(rows), data.listen_batch_size):
        batch, audio = [], []
        for index in order[start : start + data.listen_batch_size]:
            try:
                samples = load_audio(rows[index]["audio"])
            except (ValueError, TypeError, FileNotFoundError) as error:
                clips[index]["problem"] = f"unreadable: {error}"
                continue
            clips[index]["seconds"] = round(len(samples) / SAMPLE_RATE, 3)
            if len(samples) > processor.feature_extractor.n_samples:
                window = processor.feature_extractor.chunk_length
                clips[index]["problem"] = f"longer than Whisper's window of {window} s"
                continue
            batch.append(index)
            audio.append(samples)
        if not batch:
            continue
        features = processor(audio=audio, sampling_rate=SAMPLE_RATE).input_features
        with torch.random.fork_rng():
            torch.manual_seed(int(path.stem, 16) % 2**63 + start)  # sampled hypotheses are the same when made again
            heard = model.listen(features, data.language, **data.hypothesis_options)
        lengths = heard.state_lengths.tolist()
        for index, clip_states, ids, length in zip(
            batch, heard.audio_states.to("cpu", torch.bfloat16), heard.hypothesis_ids.cpu(), lengths, strict=True
        ):
            clips[index] |= {"states": length, "hypothesis": processor.decode_hypothesis(ids[: length - 1])}
            states[index] = clip_states[:length]
            hypotheses[index] = torch.nn.functional.pad(ids[: length - 1], (0, 1), value=-1)
    states, hypotheses = ([by_place[index] for index in sorted(by_place)] for by_place in (states, hypotheses))
    width = model.config.speech_config.d_model
    tensors = {
        "audio_states": torch.cat(states) if states else torch.zeros(0, width, dtype=torch.bfloat16),
        "hypothesis_ids": torch.cat(hypotheses).int() if states else torch.zeros(0, dtype=torch.int32),
    }
    for file, write in (
        (path.with_suffix(".safetensors"), lambda partial: save_file(tensors, partial)),
        (
            path,
            lambda partial: partial.write_text("".join(json.dumps(clip, ensure_ascii=False) + "\n" for clip in clips)),
        ),
    ):
        partial = file.with_name(f"{file.name}.partial")
        write(partial)
        partial.replace(file)


def prepare(
    source: Source,
    data: Data,
    model: VoxKrikriForConditionalGeneration,
    processor: VoxKrikriProcessor,
    folder: Path,
) -> list[Path]:
    """The source's shards under `folder`; those that are not there are made, by all processes of the run together."""
    data = replace(data, language=source.language or data.language)
    digest = sha256("".join(map(repr, [data.language, *data.hypothesis_options.items()])).encode())
    for parameter in model.speech_model.parameters():  # another Whisper hears something else
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    folder = folder / f"whisper-{digest.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    rows, state = load_source(source), PartialState()
    identity = (source.dataset, source.config, source.split, source.revision, source.audio, source.text)

    if source.streaming:
        with state.main_process_first():
            return prepare_stream(rows, identity, data, model, processor, folder)

    def read(first: int) -> list[dict]:
        part = rows.select(range(first, min(first + CLIPS_PER_SHARD, len(rows)))).to_list()
        return [row | {"audio": locate(source, row["audio"])} for row in part]

    def name_shard(first: int) -> Path:
        """A manifest's clips may change, so its shards are named by them; a dataset's by their place in a revision."""
        if source.dataset is not None:
            return folder / f"{key_of(identity, first)}.jsonl"
        return folder / f"{key_of([(row['text'], *fingerprint(row['audio'])) for row in read(first)])}.jsonl"

    paths = [name_shard(first) for first in range(0, len(rows), CLIPS_PER_SHARD)]
    mine = list(enumerate(paths))[state.process_index :: state.num_processes]
    for index, path in tqdm(mine, desc=f"listening to {source.name}", unit="shard", disable=not state.is_main_process):
        if not path.exists():
            listen(read(index * CLIPS_PER_SHARD), data, model, processor, path)
    state.wait_for_everyone()
    return paths


def locate(source: Source, audio: str | dict) -> str | dict:
    """A manifest's path from here; anything else as it is."""
    if source.path is None or not isinstance(audio, str):
        return audio
    return str(Path(source.path).parent / source.folder / audio)


def fingerprint(audio: str | dict) -> tuple:
    """What tells one recording from another: its place and size, or the bytes that a parquet file holds."""
    if isinstance(audio, str):
        path = Path(audio).resolve()
        return str(path), path.stat().st_size if path.is_file() else 0
    return (sha256(audio.get("bytes") or b"").hexdigest(),)


def prepare_stream(
    rows, identity: tuple, data: Data, model, processor: VoxKrikriProcessor, folder: Path
) -> list[Path]:
    """The shards of a set whose length nobody knows: the first short one is the last."""
    paths, stream, count = [], None, CLIPS_PER_SHARD
    while count == CLIPS_PER_SHARD:
        first = len(paths) * CLIPS_PER_SHARD
        path = folder / f"{key_of(identity, first)}.jsonl"
        if not path.exists():
            stream = stream or iter(
                rows.with_format("arrow").skip(first)
            )  # else datasets would encode the audio again
            part = [row for table in islice(stream, CLIPS_PER_SHARD) for row in table.to_pylist()]
            listen(part, data, model, processor, path)
        with path.open(encoding="utf-8") as file:
            count = sum(1 for _ in file)
        paths.append(path)
    return paths


class PreparedClips(Dataset):
    """The clips of one source, with hypothesis and states, that the recipe wants. `dropped` counts the others by reason.

    Raises:
        ValueError: where no clip is left, or more than `data.max_unreadable_share` cannot be read.
    """

    def __init__(self, source: Source, paths: list[Path], data: Data):
        name = self.name = source.name
        self.prompt, self.clips, self.places, self.shards = source.prompt, [], [], []
        self.dropped: Counter[str] = Counter()
        self.rows = []  # where each clip stands in its source
        total, unreadable = 0, []
        for index, path in enumerate(paths):
            self.shards.append(safe_open(path.with_suffix(".safetensors"), "pt"))
            first = 0
            for line in path.open(encoding="utf-8"):
                clip = json.loads(line)
                total += 1
                reason = self.refuse(clip, data)
                if reason is None:
                    self.clips.append(clip)
                    self.places.append((index, first))
                    self.rows.append(total - 1)
                else:
                    self.dropped[reason] += 1
                    if reason == "unreadable":
                        unreadable.append(f"{clip['audio']}: {clip['problem'].removeprefix('unreadable: ')}")
                first += clip["states"]
        if len(unreadable) > data.max_unreadable_share * total:
            raise ValueError(
                f"{len(unreadable)} of the {total} clips of {name} cannot be read, more than the share "
                f"{data.max_unreadable_share} that data.max_unreadable_share allows; the first: {unreadable[0]}"
            )
        if not self.clips:
            raise ValueError(f"no clip of {name} is left of {total}: {self.report()}")

    @staticmethod
    def refuse(clip: dict, data: Data) -> str | None:
        """Why a clip is not used, or None."""
        if clip["problem"] is not None:
            return "unreadable" if clip["problem"].startswith("unreadable") else clip["problem"]
        if clip["seconds"] < data.min_seconds:
            return f"shorter than {data.min_seconds} s"
        if data.max_seconds is not None and clip["seconds"] > data.max_seconds:
            return f"longer than {data.max_seconds} s"
        if not clip["text"].strip() and not data.keep_empty_text:
            return "without a text (data.keep_empty_text keeps them)"
        if len(clip["text"]) > data.max_characters_per_second * clip["seconds"]:
            return f"more than {data.max_characters_per_second} characters a second"
        return None

    def report(self) -> str:
        hours = sum(clip["seconds"] for clip in self.clips) / 3600
        left_out = "; ".join(f"{count} {reason}" for reason, count in self.dropped.most_common()) or "none"
        return f"{self.name}: {len(self)} clips, {hours:.2f} hours; left out: {left_out}"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        clip, (shard, first) = self.clips[index], self.places[index]
        last = first + clip["states"]
        return {
            "seed": index,
            "text": clip["text"],
            "prompt": self.prompt,
            "audio_states": self.shards[shard].get_slice("audio_states")[first:last].float(),
            "hypothesis_ids": self.shards[shard].get_slice("hypothesis_ids")[first : last - 1].long(),
        }


class LiveClips(Dataset):
    """Prepared clips whose audio is read again and changed: Whisper is to hear something new every time.

    Raises:
        ValueError: for a streaming source, whose clips cannot be read in another order, or one in a language of its own.
    """

    def __init__(self, prepared: PreparedClips, source: Source, data: Data, extractor: WhisperFeatureExtractor):
        if source.streaming:
            raise ValueError(f"data.live reads clips in any order, {source.name} is streaming: set streaming: false")
        if source.language not in (None, data.language):
            raise ValueError(
                f"with data.live all sources are in data.language, {source.name} is in {source.language!r}"
            )
        self.prepared, self.clips, self.data, self.extractor = prepared, prepared.clips, data, extractor
        self.source, self.audio = source, load_source(source)

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict:
        samples = load_audio(locate(self.source, self.audio[self.prepared.rows[index]]["audio"]))
        speed = self.data.speeds[int(torch.randint(len(self.data.speeds), ()))]
        if len(samples) / speed <= self.extractor.n_samples:
            samples = soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE)
        features = self.extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features[0]
        frames = min(features.shape[1], len(samples) // self.extractor.hop_length)
        for axis, length, share in (
            (0, features.shape[0], self.data.masked_mels),
            (1, frames, self.data.masked_frames),
        ):
            for _ in range(2):
                width = int(torch.rand(()) * share * length)
                start = int(torch.rand(()) * (length - width))
                features.narrow(axis, start, width).zero_()
        clip = {"seed": index, "text": self.clips[index]["text"], "prompt": self.source.prompt}
        return clip | {"input_features": features}


class Texts(Dataset):
    """The texts of a source that has nothing to be heard.

    Raises:
        ValueError: where the prompt names a column that the source does not have, or there is no text.
    """

    def __init__(self, source: Source):
        self.name, self.clips = source.name, []
        for row in load_source(source):
            try:
                prompt = source.prompt.format(**row)
            except KeyError as error:
                raise ValueError(
                    f"the prompt {source.prompt!r} of {self.name} asks for {error}, which is no column of it: {list(row)}"
                ) from error
            for text in textwrap.wrap(row[source.text] or "", LONGEST_TEXT, break_long_words=False):
                # As long as it would take to say: batches are filled by seconds.
                self.clips.append({"text": text, "prompt": prompt, "seconds": len(text) / CHARACTERS_A_SECOND})
        if not self.clips:
            raise ValueError(f"{source.path or source.dataset} has no text")

    def report(self) -> str:
        return f"{self.name}: {len(self)} texts"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        clip = self.clips[index]
        return {"seed": index, "text": clip["text"], "prompt": clip["prompt"]}


def mix(sources: list[Source], sets: list[PreparedClips | LiveClips | Texts]) -> Dataset:
    """One epoch: of every set as many hours, and these as often, as its source says; what is drawn is always the same."""
    parts = []
    for source, clips in zip(sources, sets, strict=True):
        order = random.Random(0).sample(range(len(clips)), len(clips))
        if source.hours is not None:
            seconds = list(accumulate(clips.clips[index]["seconds"] for index in order))
            order = order[: bisect_right(seconds, 3600 * source.hours)]
        whole, rest = divmod(source.weight, 1)
        parts.append(Subset(clips, order * int(whole) + order[: round(rest * len(order))]))
    return ConcatDataset(parts)
