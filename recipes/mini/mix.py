"""Writes new sentences out of old ones, so that the fusion has to listen: it cannot know them by heart.

    python -m recipes.mini.mix --text lm_train.txt speech_train.txt fusion_train.txt --count 30000 --out data/mixed.txt

* A sentence is a walk: after each word goes what follows it somewhere in the texts (a bigram chain). Frequent words lead
  elsewhere almost every time, rare ones keep their surroundings: every word is real, and so is every pair.
* No sentence of the texts, and none twice. The same seed gives the same sentences.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from recipes.mini.speak import greek_sentences


WALKS_A_SENTENCE = 100  # before the texts count as exhausted; running text needs less than two


def followers(sentences: list[list[str]]) -> dict[str, list[str]]:
    """What followed each word, as often as it did; "" stands before the first word and after the last."""
    table = defaultdict(list)
    for words in sentences:
        for word, following in zip(["", *words], [*words, ""], strict=True):
            table[word].append(following)
    return table


def walk(table: dict[str, list[str]], rng: random.Random) -> list[str]:
    words = []
    while following := rng.choice(table[words[-1] if words else ""]):
        words.append(following)
    return words


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="running Greek text, UTF-8")
    parser.add_argument("--count", type=int, required=True, help="how many sentences to write")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-words", type=int, default=22, help="longer walks are left out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    lines = [line for path in args.text for line in path.read_text(encoding="utf-8").splitlines()]
    sentences = [sentence.split() for sentence in greek_sentences(lines)]
    table, seen, rng = followers(sentences), set(map(tuple, sentences)), random.Random(args.seed)
    written, walks = [], 0
    with tqdm(total=args.count, unit="sentence", desc=str(args.out)) as progress:
        while len(written) < args.count:
            words = tuple(walk(table, rng)) if sentences else ()
            walks += 1
            if 2 < len(words) <= args.max_words and words not in seen:
                seen.add(words)
                written.append(" ".join(words))
                progress.update()
            elif walks > WALKS_A_SENTENCE * (len(written) + 10):
                parser.error(
                    f"the texts' words lead to {len(written)} new sentences, not {args.count}: give more text"
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    partial.write_text("\n".join(written) + "\n", encoding="utf-8")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
