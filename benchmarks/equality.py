"""Whether decoding has one answer: batches and single clips, with and without a draft, give the same tokens.

    python -m benchmarks.equality data/test/manifest.jsonl               # all clips, both modes: half an hour
    python -m benchmarks.equality data/test/manifest.jsonl --clips 76    # a tenth

Prints how many clips were compared; ends with an error that names the clips whose tokens differ.
"""

import argparse
import json
import random
from pathlib import Path

from tqdm import tqdm

from benchmarks.decoding import Bench, draft_of, edit_words
from tools.evaluate import load
from voxkrikri.processing_voxkrikri import load_audio


BATCH_SIZES = (1, 16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent), help="default: the mini")
    parser.add_argument("--clips", type=int, help="only the first")
    parser.add_argument("--language", default="el")
    args = parser.parse_args(argv)

    entries = [json.loads(line) for line in args.manifest.open(encoding="utf-8")][: args.clips]
    model, processor = load(args.model)
    clips = [load_audio(args.manifest.parent / entry["audio"]) for entry in entries]
    compared, expected = 0, {}
    for batch_size in BATCH_SIZES:
        starts = tqdm(range(0, len(clips), batch_size), desc="reading", unit="batch")
        features = [
            processor(audio=clips[start : start + batch_size], sampling_rate=16_000).input_features for start in starts
        ]
        for mode in ("full", "causal"):
            bench = Bench(model, processor, features, mode, args.language, caching={})
            end, rng = bench.model.end_token_ids[0], random.Random(0)
            others = [word for batch in bench.words for words in batch for word in words]
            written = {"no draft": [words for batch in bench.words for words in batch]}
            expected.setdefault(mode, written["no draft"])
            drafts = {
                "the hypothesis": [bench.processor.draft(texts) for texts in bench.hypotheses],
                "a fifth of the words wrong": [
                    draft_of([edit_words(words, 0.2, others, rng) for words in batch], end) for batch in bench.words
                ],
            }
            for name, batches in drafts.items():
                pairs = zip(bench.batches, batches, strict=True)
                outputs = [bench.decode(*pair) for pair in tqdm(pairs, desc=f"{mode}, {batch_size}, {name}")]
                written[name] = [bench.split_words(ids) for output in outputs for ids in output.sequences.tolist()]
            for name, texts in written.items():
                triples = zip(entries, texts, expected[mode], strict=True)
                differing = [entry["audio"] for entry, text, plain in triples if text != plain]
                if differing:
                    raise SystemExit(f"{mode}, batches of {batch_size}, {name}: {', '.join(differing)} differ")
                compared += len(texts)
    print(f"{len(clips)} clips, {compared} texts: token by token those of single clips without a draft")


if __name__ == "__main__":
    main()
