import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from metrics.greek_wer.greek_wer import (
    LATIN_LOOK_ALIKES,
    bootstrap,
    character_error_rate,
    error_counts,
    normalize,
    paired_bootstrap,
    word_error_rate,
)


FOLDER = Path(__file__).parents[1] / "metrics" / "greek_wer"

REFERENCES = ["Ο Νίκος, τάχα, έφυγε.", "", "Πότε θα ’ρθεις;", "«Σ' αυτό το σπίτι»", "Ναι."]
HYPOTHESES = ["ο νίκος έφυγε χθες", "ναι", "ποτέ θα ρθεις", "σ’ αυτό το σπίτι", ""]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("ΤΟΥΣ ΛΌΓΟΥΣ ΣΑΣ", "τουσ λόγουσ σασ", id="case-and-final-sigma"),
        pytest.param(unicodedata.normalize("NFD", "μαΐου άνοιξη"), "μαΐου άνοιξη", id="decomposed"),
        pytest.param("\u1f71\u1f79 \u2126", "άό ω", id="oxia-and-ohm"),
        pytest.param("Ϊ\u0301", "ΐ", id="capital-that-only-exists-decomposed"),
        pytest.param("«Τι;» είπε\u037e (ναι) “όχι” „δα“ ‹α›", "τι είπε ναι όχι δα α", id="quotes-and-question-marks"),
        pytest.param("μία· δύο\u0387 τρία… τέσσερα... πέντε!", "μία δύο τρία τέσσερα πέντε", id="ano-teleia-ellipsis"),
        pytest.param("α-β\u2010γ\u2011δ–ε—ζ―η−θ", "α β γ δ ε ζ η θ", id="dashes"),
        pytest.param("• ένα ● δύο ‣ τρία * τέσσερα", "ένα δύο τρία τέσσερα", id="bullets"),
        pytest.param("50% & 3,5 €", "50 3 5", id="symbols"),
        pytest.param(
            "κα\u00adλη\u200bμέρα\ufeff ❤\ufe0f σε\u00a0όλους\n\tεδώ", "καλημέρα σε όλουσ εδώ", id="invisible"
        ),
        pytest.param("ἀπ\u0313 ᾳ", "ἀπ ᾳ", id="polytonic-kept-loose-mark-dropped"),
        pytest.param("ΟI ANΘΡΩΠOI ΓABEZHIKMNOPTYX", "οι ανθρωποι γαβεζηικμνορτυχ", id="latin-capitals"),
        pytest.param("πóλη Áθήνα λaeikoptuvxyµ", "πόλη άθήνα λαεικορτυνχγμ", id="latin-small-and-accented"),
        pytest.param("Windows και TAXI µ", "windows και taxi µ", id="latin-words-stay"),
        pytest.param("", "", id="empty"),
        pytest.param(" …«»· ", "", id="punctuation-only"),
    ],
)
def test_normalize(text, words):
    assert normalize(text) == words


@pytest.mark.parametrize("apostrophe", "'’‘ʼ᾽΄´`′᾿\u02b9\u0374\u02bb\uff07")
def test_every_apostrophe_of_elision_scores_equal(apostrophe):
    assert normalize(f"Σ{apostrophe} αυτό") == normalize(f"σ{apostrophe}αυτό") == "σ αυτό"


@pytest.mark.parametrize(("one", "other"), [("πότε", "ποτέ"), ("παιδάκια", "παϊδάκια"), ("φτάνω", "φθάνω")])
def test_accents_and_spelling_are_kept(one, other):
    assert normalize(one) != normalize(other)


def test_latin_look_alikes_become_greek_letters_of_their_own_case():
    for latin, greek in LATIN_LOOK_ALIKES.items():
        assert unicodedata.name(chr(greek)).startswith("GREEK")
        assert chr(latin).isupper() == chr(greek).isupper()


def test_normalizing_twice_changes_nothing():
    characters = [chr(code) for code in range(0x3000) if unicodedata.category(chr(code)) != "Cs"]
    texts = characters + [f"α{character}β" for character in characters] + [f"{c}\u0301Α" for c in characters]
    once = [normalize(text) for text in texts]
    assert [normalize(text) for text in once] == once


def edit_distance(reference: list[str] | str, hypothesis: list[str] | str) -> int:
    """The textbook recurrence, row by row."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        previous, row = row, [i]
        for j, found in enumerate(hypothesis, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (expected != found)))
    return row[-1]


def random_texts(seed: int, utterances: int = 30) -> list[str]:
    draw = random.Random(seed)
    words = ["Και", "και", "ναι,", "ναι", "σ’", "σ'", "πότε;", "ποτέ", "-", "Ο"]
    return [" ".join(draw.choices(words, k=draw.randint(0, 6))) for _ in range(utterances)]


def test_counts_and_rates_equal_the_textbook_edit_distance():
    references, hypotheses = random_texts(seed=1), random_texts(seed=2)
    for raw in (False, True):
        clean = [(r, h) if raw else (normalize(r), normalize(h)) for r, h in zip(references, hypotheses, strict=True)]
        word_pairs = [(r.split(), h.split()) for r, h in clean]
        for characters, pairs in ((False, word_pairs), (True, clean)):
            counts = error_counts(references, hypotheses, characters=characters, raw=raw)
            assert counts.errors.tolist() == [edit_distance(r, h) for r, h in pairs]
            assert counts.lengths.tolist() == [len(r) for r, _ in pairs]
            rate = character_error_rate if characters else word_error_rate
            assert rate(references, hypotheses, raw=raw) == counts.errors.sum() / counts.lengths.sum()


def test_rates_by_hand():
    # "τάχα" left out, "χθες" and "ναι" put in, "πότε" mistaken, "ναι" left out; the elisions are equal.
    assert error_counts(REFERENCES, HYPOTHESES).errors.tolist() == [2, 1, 1, 0, 1]
    assert word_error_rate(REFERENCES, HYPOTHESES) == 5 / 12
    assert word_error_rate(["α  β\n"], ["α β"], raw=True) == 0


def test_empty_references_count_insertions():
    assert word_error_rate(["ένα δύο", ""], ["ένα δύο", "τρία"]) == 1 / 2
    assert word_error_rate(["", "…"], ["ένα δύο", ""]) == 2
    assert character_error_rate([""], ["ένα"]) == 3
    assert word_error_rate([""], [""]) == 0
    assert bootstrap([""], ["ένα"], samples=5) == (1, 1, 1)
    assert paired_bootstrap([""], ["ένα"], [""], samples=5) == (1, 1, 1)
    assert paired_bootstrap([""], [""], ["ένα"], samples=5) == (-1, -1, -1)


def test_bootstraps_equal_scoring_resampled_corpora():
    references, worse, better = random_texts(seed=3), random_texts(seed=4), random_texts(seed=3)
    better[::3] = random_texts(seed=5)[::3]
    generator = np.random.default_rng(7)
    rates, reductions = [], []
    for _ in range(200):
        draw = generator.integers(len(references), size=len(references))
        rate_a, rate_b = (
            word_error_rate([references[i] for i in draw], [hypotheses[i] for i in draw])
            for hypotheses in (worse, better)
        )
        rates.append(rate_a)
        reductions.append(1 - rate_b / rate_a)
    rate = word_error_rate(references, worse)
    one = bootstrap(references, worse, samples=200, seed=7)
    two = paired_bootstrap(references, worse, better, samples=200, seed=7)
    np.testing.assert_allclose(one, [rate, *np.percentile(rates, [2.5, 97.5])])
    reduction = 1 - word_error_rate(references, better) / rate
    np.testing.assert_allclose(two, [reduction, *np.percentile(reductions, [2.5, 97.5])])
    assert 0 < two.low < two.value < two.high < 1


def test_paired_bootstrap_of_equal_and_of_perfect_systems():
    references, hypotheses = random_texts(seed=1), random_texts(seed=2)
    assert paired_bootstrap(references, hypotheses, hypotheses, samples=100) == (0, 0, 0)
    assert paired_bootstrap(references, hypotheses, references, samples=100) == (1, 1, 1)
    assert paired_bootstrap(references, references, references, samples=100) == (0, 0, 0)


def test_the_interval_covers_the_truth_about_19_times_in_20():
    """Corpora of 80 utterances, four words each, every word wrong with chance 0.3."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        wrong = generator.random((80, 4)) < 0.3
        hypotheses = [" ".join("λάθος" if w else "σωστό" for w in row) for row in wrong]
        interval = bootstrap(["σωστό σωστό σωστό σωστό"] * 80, hypotheses, samples=200)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.89 * 200 <= covered <= 0.99 * 200


@pytest.mark.parametrize(
    ("references", "hypotheses", "error", "message"),
    [
        (["ένα", "δύο"], ["ένα"], ValueError, r"unequal length: \{'references': 2, 'hypotheses': 1\}"),
        ([], [], ValueError, "references is empty"),
        (["ένα"], [None], TypeError, r"hypotheses\[0\] is None \(NoneType\)"),
        (["ένα", 2], ["ένα", "δύο"], TypeError, r"references\[1\] is 2 \(int\)"),
        ("ένα", ["ένα"], TypeError, "references is one string"),
    ],
)
def test_bad_lists_are_named(references, hypotheses, error, message):
    for score in (error_counts, word_error_rate, character_error_rate, bootstrap):
        with pytest.raises(error, match=message):
            score(references, hypotheses)


def test_bad_bootstraps_are_named():
    with pytest.raises(ValueError, match="'hypotheses_a': 1, 'hypotheses_b': 2"):
        paired_bootstrap(["ένα"], ["ένα"], ["ένα", "δύο"])
    with pytest.raises(ValueError, match="samples is 0"):
        bootstrap(["ένα"], ["ένα"], samples=0)


def test_evaluate_loads_the_folder_offline(tmp_path):
    """In a process of its own, outside the repository, with an empty cache and no network."""
    script = (
        "import evaluate, json, sys\n"
        "folder, references, hypotheses = json.load(sys.stdin)\n"
        "metric = evaluate.load(folder)\n"
        "print(json.dumps(metric.compute(references=references, predictions=hypotheses)))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([str(FOLDER), REFERENCES, HYPOTHESES]),
        env={"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(loaded.stdout) == {
        "wer": word_error_rate(REFERENCES, HYPOTHESES),
        "cer": character_error_rate(REFERENCES, HYPOTHESES),
        "wer_raw": word_error_rate(REFERENCES, HYPOTHESES, raw=True),
        "cer_raw": character_error_rate(REFERENCES, HYPOTHESES, raw=True),
    }
