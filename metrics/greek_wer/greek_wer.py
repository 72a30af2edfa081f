"""Word and character error rates of Greek transcripts, raw and normalised, with bootstrap intervals.

The headline is the normalised rate: lower case, final sigma folded, punctuation removed, accents kept. Rates are
fractions (0.25 is 25 %) over the whole corpus: all edits divided by all reference words or characters. What is
unusual:

* An empty reference is legal: every word said for it is an insertion. A corpus that has no reference word at all is
  divided by one, so its rate is the number of insertions (as in jiwer).
* `evaluate` copies this one file out of its folder, so everything lives here and nothing beside it is imported.
"""

import re
import unicodedata
from typing import NamedTuple

import datasets
import evaluate
import jiwer
import numpy as np


# Elision's apostrophes and the numeral sign, where Unicode calls them letters and not punctuation.
LETTER_APOSTROPHES = "\u02b9\u02bb\u02bc\u02bd"

# U and V only look like Greek when small; their capitals follow, so that normalising twice changes nothing.
LATIN_LOOK_ALIKES = str.maketrans(
    "ABEHIKMNOPTXYZ" + "UV" + "aeikoptuvxyµ",
    "ΑΒΕΗΙΚΜΝΟΡΤΧΥΖ" + "ΥΝ" + "αεικορτυνχγμ",
)


def normalize(text: str) -> str:
    """The words by which transcripts are compared, one space between them; a second call changes nothing.

    * NFC; lower case; final sigma as any sigma.
    * Punctuation and symbols of every script become spaces, apostrophes of elision too: "σ' αυτό", "σ’ αυτό" and
      "σ'αυτό" are the same two words.
    * In a word that holds a Greek letter, the Latin letters that look Greek become Greek (accented ones too).
    * Tonos and dialytika are kept; invisible characters and marks that fit no letter are dropped.

    Numbers stay as written. "Ε.Ε." becomes two words, "ΕΕ" one.
    """
    text = "".join(_keep(character) for character in unicodedata.normalize("NFC", text))
    text = " ".join(_latin_to_greek(word) for word in text.split())
    text = unicodedata.normalize("NFC", text.lower()).replace("ς", "σ")
    text = "".join(character for character in text if not unicodedata.category(character).startswith("M"))
    return " ".join(text.split())


def _keep(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "PS" or character in LETTER_APOSTROPHES:
        return " "
    if category[0] == "C" and not character.isspace():  # soft hyphens, zero-width spaces, byte order marks
        return ""
    return character


def _latin_to_greek(word: str) -> str:
    """`word` decomposed, so that "ó" is a look-alike as "o" is."""
    word = unicodedata.normalize("NFD", word)
    return word.translate(LATIN_LOOK_ALIKES) if re.search(r"[\u0370-\u03ff]", word) else word


class ErrorCounts(NamedTuple):
    """Edits per utterance.

    errors: (utterances,) substitutions + deletions + insertions between reference and hypothesis.
    lengths: (utterances,) words or characters of the reference.
    """

    errors: np.ndarray
    lengths: np.ndarray

    @property
    def rate(self) -> float:
        return float(self.errors.sum() / max(self.lengths.sum(), 1))


class Interval(NamedTuple):
    """A figure of the whole corpus and its 95 % interval over resampled corpora."""

    value: float
    low: float
    high: float


def error_counts(
    references: list[str], hypotheses: list[str], *, characters: bool = False, raw: bool = False
) -> ErrorCounts:
    """Counts each utterance's errors, in words or characters (spaces count), normalised or raw.

    Raw text is compared as it is, but for its white space: one space between words.

    Raises TypeError if a list is a string or holds anything else than strings, ValueError if the lists are empty or
    of unequal length.
    """
    _check(references=references, hypotheses=hypotheses)
    clean = _single_spaces if raw else normalize
    process = jiwer.process_characters if characters else jiwer.process_words
    outputs = [process(clean(r), clean(h)) for r, h in zip(references, hypotheses, strict=True)]
    return ErrorCounts(
        errors=np.array([output.substitutions + output.deletions + output.insertions for output in outputs]),
        lengths=np.array([output.hits + output.substitutions + output.deletions for output in outputs]),
    )


def _single_spaces(text: str) -> str:
    return " ".join(text.split())


def word_error_rate(references: list[str], hypotheses: list[str], *, raw: bool = False) -> float:
    """Word errors over reference words; arguments and errors as `error_counts`."""
    return error_counts(references, hypotheses, raw=raw).rate


def character_error_rate(references: list[str], hypotheses: list[str], *, raw: bool = False) -> float:
    """Character errors over reference characters; arguments and errors as `error_counts`."""
    return error_counts(references, hypotheses, characters=True, raw=raw).rate


def bootstrap(references: list[str], hypotheses: list[str], samples: int = 10_000, seed: int = 0) -> Interval:
    """The normalised word error rate and its interval, utterances resampled with replacement (Bisani & Ney, 2004)."""
    counts = error_counts(references, hypotheses)
    errors, words = _resampled_sums(counts.errors, counts.lengths, samples=samples, seed=seed)
    return _interval(counts.rate, errors / np.maximum(words, 1))


def paired_bootstrap(
    references: list[str],
    hypotheses_a: list[str],
    hypotheses_b: list[str],
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Relative reduction of the normalised word error rate by b against a: 0.2 is a fifth fewer errors.

    Every resampled corpus holds the same utterances for both systems (Bisani & Ney, 2004). The reference words cancel;
    an a without any error counts as one error.
    """
    _check(references=references, hypotheses_a=hypotheses_a, hypotheses_b=hypotheses_b)
    errors_a = error_counts(references, hypotheses_a).errors
    errors_b = error_counts(references, hypotheses_b).errors
    sums_a, sums_b = _resampled_sums(errors_a, errors_b, samples=samples, seed=seed)
    return _interval(_reduction(errors_a.sum(), errors_b.sum()), _reduction(sums_a, sums_b))


def _reduction(errors_a: np.ndarray, errors_b: np.ndarray) -> np.ndarray:
    return (errors_a - errors_b) / np.maximum(errors_a, 1)


def _resampled_sums(*counts: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(counts, samples): sums of each (utterances,) array over corpora of the same size, drawn with replacement."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1 (10,000 for figures to report).")
    generator = np.random.default_rng(seed)
    table = np.stack(counts)
    utterances = table.shape[1]
    draws = (generator.integers(utterances, size=utterances) for _ in range(samples))
    return np.stack([table[:, draw].sum(axis=1) for draw in draws], axis=1)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def _check(**texts: list[str]) -> None:
    for name, items in texts.items():
        if isinstance(items, str):
            raise TypeError(f"{name} is one string; expected a list with one string per utterance.")
        for index, item in enumerate(items):
            if not isinstance(item, str):
                raise TypeError(
                    f"{name}[{index}] is {item!r} ({type(item).__name__}); expected a string, '' if empty."
                )
        if len(items) == 0:
            raise ValueError(f"{name} is empty; expected at least one utterance.")
    sizes = {name: len(items) for name, items in texts.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"Lists of unequal length: {sizes}; expected one hypothesis per reference, in the same order."
        )


class GreekWer(evaluate.Metric):
    """What `evaluate.load("metrics/greek_wer")` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Word and character error rates of Greek transcripts, normalised and raw, as fractions.",
            citation="",
            inputs_description="predictions, references: lists of strings, one per utterance, in the same order.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "wer": word_error_rate(references, predictions),
            "cer": character_error_rate(references, predictions),
            "wer_raw": word_error_rate(references, predictions, raw=True),
            "cer_raw": character_error_rate(references, predictions, raw=True),
        }
