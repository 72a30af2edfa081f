"""What a recipe says: its four parts, its keys, and what it refuses.

A recipe is a YAML file; `part.key=value` on the command line overrides it. `model` holds backbones and fusion, or
`init_from`; `data` the clips and what is learnt from them; `prepared` where hypotheses and states are kept; `training`
transformers' TrainingArguments.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import yaml


PRESETS = Path(__file__).parent.parent / "recipes" / "sources"
TASKS = ("fusion", "correction")
TARGETS = ("reference", "hypothesis")


@dataclass
class Source:
    """Clips and transcripts: a manifest (`path` to .jsonl, .csv, .tsv or .parquet) or a dataset on the Hub.

    A .txt file, one text a line, or a source with `audio: null` has texts alone, for the LLM to read.
    `preset` names a file of recipes/sources, whose settings hold where the recipe has none.
    """

    path: str | None = None
    folder: str = ""  # where a manifest's audio lies, from where the manifest lies
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    streaming: bool = False  # a dataset is read as it comes, without a copy on the disk
    audio: str | None = "audio"
    text: str = "text"
    language: str | None = None  # of the speech; data.language if left out
    prompt: str = ""  # what the LLM reads before the text; of texts alone, with {column} for what a row holds
    weight: float = 1.0  # how often its clips come in an epoch; 0.5 is a half of them, drawn once
    hours: float | None = None  # at most so many, drawn once

    @property
    def name(self) -> str:
        if self.path is None:
            return self.dataset.replace("/", "--")
        path = Path(self.path).resolve()
        return path.stem if self.has_texts_alone else path.parent.name

    @property
    def has_texts_alone(self) -> bool:
        return self.audio is None or Path(self.path or "").suffix == ".txt"


@dataclass
class Data:
    train: list[Source]
    validation: list[Source]
    task: str = "fusion"  # or "correction": the hypothesis is the prompt and the states are zeros, for comparison
    target: str = "reference"  # or "hypothesis": a first stage that learns to spell out what the states say
    language: str | None = None
    hypothesis_temperature: float = 0.0  # above 0 hypotheses are sampled: more errors to learn from, and other ones
    input_noise: float = 0.0  # share of the input text tokens taken from the hypothesis instead
    fusion_modes: list[str] = field(default_factory=lambda: ["full", "causal"])  # one drawn for every batch
    prefix_share: float = 0.0  # of clips cut off as a stream cuts them: what is heard so far, and no end
    ratio_jitter: float = 0.0  # T is off by up to this share, as it is where a stream guesses it
    live: bool = False  # Whisper hears every clip anew, changed by what follows: slower, and less is learnt by heart
    speeds: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])  # one drawn for every clip
    masked_frames: float = 0.05  # share of the frames in two spans of zeros (SpecAugment)
    masked_mels: float = 0.1  # share of the mel bins, likewise
    batch_seconds: float | None = None  # of speech in a batch, padding counted; else per_device_train_batch_size clips
    loss_chunk_size: int | None = None  # labelled rows whose logits are in memory at a time
    listen_batch_size: int = 16
    min_seconds: float = 0.1
    max_seconds: float | None = None  # Whisper's window is the limit in any case
    max_characters_per_second: float = 35.0  # of the transcript: beyond it, it is another clip's
    keep_empty_text: bool = False  # clips of silence or noise, from which to learn to write nothing
    max_unreadable_share: float = 0.02  # more unreadable clips than that stop the run

    @property
    def hypothesis_options(self) -> dict:
        """How Whisper decodes the hypotheses."""
        if self.hypothesis_temperature == 0:
            return {}
        return {"do_sample": True, "temperature": float(self.hypothesis_temperature), "top_k": 0}


@dataclass
class Recipe:
    """What a YAML file holds. `model` has `speech`, `text` and the fusion's settings, or `init_from`."""

    model: dict
    data: Data
    training: dict
    prepared: str = "data/prepared"
    learning_rates: dict[str, float] = field(default_factory=dict)  # of "fusion" and "text" (the LLM); 0 freezes one


def check_names(given: Iterable[str], known: list[str], where: str) -> None:
    """Raises a ValueError for the first name that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
            raise ValueError(f"{where} has no {name!r}: {hint}")


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
        check_names(values, [known.name for known in fields(kind)], f"{path}: {where}")
        needed = [known.name for known in fields(kind) if known.default is known.default_factory is MISSING]
        for name in needed:
            if name not in values:
                raise ValueError(f"{path}: {where} needs {name!r} (all it needs: {', '.join(needed)})")
        return kind(**values)

    def build_sources(values: dict | list[dict], where: str) -> list[Source]:
        sources = []
        for entry in values if isinstance(values, list) else [values]:
            entry = dict(entry)
            if preset := entry.pop("preset", None):
                check_names([preset], sorted(file.stem for file in PRESETS.glob("*.yaml")), "recipes/sources")
                entry = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")) | entry
            sources.append(build(Source, entry, where))
        for source in sources:
            if (source.path is None) == (source.dataset is None):
                raise ValueError(f"{path}: {where} is either a path or a dataset")
        return sources

    recipe = build(Recipe, content, "the recipe")
    recipe.data = build(Data, recipe.data, "data")
    for part in ("train", "validation"):
        setattr(recipe.data, part, build_sources(getattr(recipe.data, part), f"a source in data.{part}"))
    for name, known in (("task", TASKS), ("target", TARGETS)):
        if getattr(recipe.data, name) not in known:
            raise ValueError(f"{path}: data.{name} is one of {known}, got {getattr(recipe.data, name)!r}")
    return recipe
