"""What a draft saves: passes of the LLM and seconds, over how wrong the draft is.

    python -m benchmarks.decoding data/test/manifest.jsonl --clips 32 --out docs/results

* Drafts are the tokens of plain greedy decoding with a share of their words replaced, left out or doubled up, the
  hypothesis itself, and another clip's text. Every drafted text must equal the plain one, token by token.
* Seconds are of the LLM alone (Whisper listened before), median of `--repeats` after one run to warm up, plain and
  drafted decoding in turn; the spread is printed beside it.
* Writes decoding.md, decoding.json and decoding.png into --out.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from matplotlib import pyplot
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tools.evaluate import load
from voxkrikri.generation_voxkrikri import VoxKrikriAudio
from voxkrikri.processing_voxkrikri import load_audio


SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)


def edit_words(words: list[list[int]], share: float, others: list[list[int]], rng: random.Random) -> list[list[int]]:
    """`words` with about a share of them replaced by others, left out, or followed by another."""
    edited = []
    for word in words:
        kind = rng.choice(["replace", "leave out", "insert"]) if rng.random() < share else "keep"
        other = rng.choice(others)
        edited += {"keep": [word], "replace": [other], "leave out": [], "insert": [word, other]}[kind]
    return edited


def draft_of(texts: list[list[list[int]]], end: int) -> dict[str, torch.Tensor]:
    """The draft of a batch of texts, each a list of words, each a list of tokens."""
    ids = [torch.tensor([token for word in words for token in word] + [end]) for words in texts]
    starts = [
        torch.tensor([place == 0 for word in words for place in range(len(word))] + [True], dtype=torch.bool)
        for words in texts
    ]
    return {
        "draft_ids": pad_sequence(ids, batch_first=True, padding_value=-1),
        "draft_word_starts": pad_sequence(starts, batch_first=True),
    }


class Bench:
    """One model, what its Whisper heard, and the texts of plain greedy decoding."""

    def __init__(self, folder: str, clips: list, batch_size: int, mode: str, language: str | None):
        self.model, self.processor = load(folder)
        self.mode, self.batches, self.hypotheses = mode, [], []
        for start in tqdm(range(0, len(clips), batch_size), desc="listening", unit="batch"):
            features = self.processor(audio=clips[start : start + batch_size], sampling_rate=16_000).input_features
            heard: VoxKrikriAudio = self.model.listen(features, language)
            hypotheses = [self.processor.decode_hypothesis(ids) for ids in heard.hypothesis_ids]
            counts = torch.tensor(self.processor.hypothesis_token_counts(hypotheses), device=self.model.device)
            self.batches.append({**heard, "hypothesis_token_counts": counts})
            self.hypotheses.append(hypotheses)
        self.plain = [self.decode(batch) for batch in self.batches]
        self.words = [[self.split_words(ids) for ids in output.sequences.tolist()] for output in self.plain]

    def split_words(self, ids: list[int]) -> list[list[int]]:
        """The tokens of a text, word by word, without its end."""
        words = []
        for token in ids:
            if token in self.model.end_token_ids:
                break
            if not words or self.model.text_bytes[token][0] == ord(" "):
                words.append([])
            words[-1].append(token)
        return words

    def decode(self, batch: dict, draft: dict | None = None):
        return self.model.generate(**batch, **(draft or {}), fusion_mode=self.mode, return_dict_in_generate=True)

    def seconds(self, drafts: list[dict] | None) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for index, batch in enumerate(self.batches):
            self.decode(batch, drafts and drafts[index])
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def measure(self, name: str, drafts: list[dict], repeats: int) -> dict:
        """Passes and seconds with these drafts beside plain decoding's.

        Raises:
            ValueError: if a draft changed a token.
        """
        outputs = [self.decode(batch, draft) for batch, draft in zip(self.batches, drafts, strict=True)]
        for plain, output in zip(self.plain, outputs, strict=True):
            if not torch.equal(plain.sequences, output.sequences):
                raise ValueError(f"the draft {name!r} changed the text: decoding is not exact")
        ratios, seconds = [], []
        for repeat in range(repeats + 1):
            plain, drafted = self.seconds(None), self.seconds(drafts)
            if repeat:
                ratios.append(plain / drafted)
                seconds.append(drafted)
        return {
            "draft": name,
            "passes": statistics.mean(output.passes for output in outputs),
            "plain_passes": statistics.mean(output.passes for output in self.plain),
            "drafted": sum(int(output.drafted.sum()) for output in outputs),
            "accepted": sum(int(output.accepted.sum()) for output in outputs),
            "seconds": statistics.median(seconds),
            "speedup": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent), help="default: the mini")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--fusion-mode", default="full")
    parser.add_argument("--language", default="el")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    entries = [json.loads(line) for line in args.manifest.open(encoding="utf-8")][: args.clips]
    clips = [load_audio(args.manifest.parent / entry["audio"]) for entry in entries]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    results = []
    for batch_size in args.batch_sizes:
        bench = Bench(args.model, clips, batch_size, args.fusion_mode, args.language)
        flat, end = [words for batch in bench.words for words in batch], bench.model.end_token_ids[0]
        others = [word for words in flat for word in words]
        rng = random.Random(0)
        drafts = {
            f"{share:.0%} of the words wrong": [
                draft_of([edit_words(words, share, others, rng) for words in batch], end) for batch in bench.words
            ]
            for share in SHARES
        }
        drafts["the hypothesis"] = [bench.processor.draft(texts) for texts in bench.hypotheses]
        shifted = flat[1:] + flat[:1]
        drafts["another clip's text"] = [
            draft_of(shifted[start : start + batch_size], end) for start in range(0, len(flat), batch_size)
        ]
        for name, batches in tqdm(drafts.items(), desc=f"batches of {batch_size}"):
            results.append({"batch_size": batch_size} | bench.measure(name, batches, args.repeats))

    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"machine": f"{machine}, {platform.machine()}", "torch": torch.__version__, "clips": len(clips)}
    (args.out / "decoding.json").write_text(json.dumps(facts | {"rows": results}, indent=1) + "\n", encoding="utf-8")
    lines = [
        "| batch | draft | passes of the LLM | without | times as fast (spread) |",
        "|---|---|---|---|---|",
        *(
            f"| {row['batch_size']} | {row['draft']} | {row['passes']:.1f} | {row['plain_passes']:.1f} | "
            f"{row['speedup']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f}) |"
            for row in results
        ),
    ]
    (args.out / "decoding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for batch_size in args.batch_sizes:
        rows = [row for row in results if row["batch_size"] == batch_size][: len(SHARES)]
        axes[0].plot([100 * share for share in SHARES], [row["passes"] for row in rows], marker="o")
        axes[1].plot(
            [100 * s for s in SHARES], [row["speedup"] for row in rows], marker="o", label=f"batch {batch_size}"
        )
    axes[0].set_ylabel("passes of the LLM")
    axes[1].set_ylabel("times as fast as plain greedy")
    axes[1].axhline(1, color="#333333", linewidth=0.8)
    axes[1].legend()
    for axis in axes:
        axis.set_xlabel("words of the draft that are wrong, %")
        axis.set_ylim(bottom=0)
    figure.savefig(args.out / "decoding.png", dpi=120)


if __name__ == "__main__":
    main()
