"""The benchmarks run, on tiny models; what they measure is not judged here."""

import copy
import json

import pytest
import torch

from benchmarks import decoding


def test_drafts_and_stages_of_random_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "build", lambda full_size: copy.deepcopy(tiny.model))
    monkeypatch.setattr(decoding, "SECONDS", 2.0)
    decoding.main(["--clips", "4", "--batch-sizes", "1", "2", "--repeats", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "decoding.json").read_text(encoding="utf-8"))
    assert (results["weights"], results["seconds_a_clip"], results["compiled"]) == ("random", 2.0, False)
    assert len(results["rows"]) == 2 * (len(decoding.SHARES) + 2)
    for row in results["rows"]:
        assert row["plain_passes"] == 40 and row["widest_divergence"] is None
        if row["draft"].startswith("0%"):
            assert row["passes"] < 4 and row["accepted"] == row["drafted"] > 0
        if row["draft"] == "another clip's text":
            assert row["passes"] > 30
    assert len(results["stages"]) == 2 * 6
    assert all(row["same_hypotheses"] and row["largest_difference"] == 0 for row in results["whisper"])
    page = (tmp_path / "decoding.md").read_text(encoding="utf-8")
    assert "Every drafted text is the plain one" in page and page.count("\n|") == 2 + 14 + 2 + 12
    assert (tmp_path / "decoding.png").stat().st_size > 10_000


def test_a_draft_that_changes_the_text_is_an_error(tiny, features):
    bench = decoding.Bench(tiny.model, tiny.processor, [features], "full", None, caching={})
    drafts = [tiny.processor.draft(texts) for texts in bench.hypotheses]
    right = bench.compare("the hypothesis", drafts, repeats=1)
    assert right["widest_divergence"] is None
    wrong = bench.plain[0].sequences[0, 1].item()
    bench.plain[0].sequences[0, 1] = (wrong + 1) % len(tiny.model.text_bytes)
    with pytest.raises(ValueError, match="'the hypothesis' changed the text"):
        bench.compare("the hypothesis", drafts, repeats=1)


def test_compiling_after_the_warm_up_is_an_error():
    counters = torch._dynamo.utils.counters["stats"]

    def work(times: list[int]) -> None:
        times.append(1)
        counters["unique_graphs"] += len(times) in compiled

    for compiled in ({1}, {1, 3}):
        ways = {"way": [lambda times=[]: work(times)]}  # noqa: B006
        if 3 in compiled:
            with pytest.raises(RuntimeError, match="1 graphs were compiled after the warm-up"):
                decoding.time_in_turn(ways, repeats=3)
        else:
            assert len(decoding.time_in_turn(ways, repeats=3)["way"]) == 3
