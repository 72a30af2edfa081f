from functools import lru_cache

import numpy as np
import pytest
import torch

from voxkrikri.transcription_voxkrikri import (
    BATCHES_AHEAD,
    edit_distance,
    is_silent,
    split_at_quiet_points,
    transcribe,
    transcribe_each,
)


KEYS = ["text", "hypothesis", "start", "end", "words", "agreement", "confidence", "speaker"]


def noise(seconds: float, seed: int = 1) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000))).astype(np.float32)


# ---- cutting


@pytest.mark.parametrize("count", [1, 999, 1_000, 1_001, 1_500, 2_001, 31_234])
def test_pieces_cover_the_audio_exactly(count):
    pieces = split_at_quiet_points(noise(count / 16_000), longest=1_000)
    starts, ends = zip(*pieces, strict=True)
    assert starts == (0, *ends[:-1]) and ends[-1] == count
    lengths = [end - start for start, end in pieces]
    assert max(lengths) <= 1_000
    assert min(lengths) >= min(count, 1_000 // 6)
    assert len(pieces) >= count / 1_000


def test_cuts_fall_into_the_pauses():
    audio = noise(30)
    pauses = [(7.0, 7.5), (15.5, 16.0), (22.2, 22.8)]
    for start, end in pauses:
        audio[int(start * 16_000) : int(end * 16_000)] *= 0.01
    audio[int(3.0 * 16_000) : int(3.5 * 16_000)] = 0  # quieter, but in the first two thirds of a window
    cuts = [end / 16_000 for _, end in split_at_quiet_points(audio, 9 * 16_000)[:-1]]
    assert len(cuts) == len(pauses)
    for cut, (start, end) in zip(cuts, pauses, strict=True):
        assert start + 0.1 <= cut <= end - 0.1


def test_equally_quiet_audio_is_cut_late():
    assert split_at_quiet_points(np.zeros(2_500, dtype=np.float32), 1_000) == [
        (0, 1_000),
        (1_000, 2_000),
        (2_000, 2_500),
    ]


# ---- silence


@pytest.mark.parametrize(
    "audio",
    [np.zeros(16_000), np.full(40_000, 0.2), 1e-4 * noise(0.5)],
    ids=["digital", "constant offset", "-70 dBFS"],
)
def test_silence_is_empty_text_and_no_model_is_asked(audio, processor):
    (result,) = transcribe(None, processor, [audio], sampling_rate=16_000)
    assert result == {
        **dict.fromkeys(KEYS),
        "text": "",
        "hypothesis": "",
        "start": 0.0,
        "end": len(audio) / 16_000,
        "segments": [],
    }


def test_the_gate_lies_at_60_db_below_full_scale():
    click = np.zeros(16_000, dtype=np.float32)
    click[5_000] = 1.1e-3
    assert not is_silent(click)
    click[5_000] = 0.9e-3
    assert is_silent(click)


def test_silent_pieces_of_longer_audio_have_no_segment(tiny):
    audio = np.concatenate([noise(0.9), np.zeros(32_000, dtype=np.float32), noise(0.9, seed=2)])
    (result,) = transcribe(tiny.model, tiny.processor, [audio], sampling_rate=16_000)
    assert [segment["end"] - segment["start"] <= 1 for segment in result["segments"]] == [True] * len(
        result["segments"]
    )
    covered = sum(segment["end"] - segment["start"] for segment in result["segments"])
    assert 1.8 <= covered < 3.0
    assert (result["segments"][0]["start"], result["segments"][-1]["end"], result["end"]) == (0.0, 3.8, 3.8)


# ---- results


def test_result_schema(tiny, clips):
    results = transcribe(tiny.model, tiny.processor, [clips[1], noise(2.6)], sampling_rate=16_000)
    for result in results:
        assert list(result) == [*KEYS, "segments"]
        assert result["words"] is None and result["speaker"] is None
        for segment in result["segments"]:
            assert list(segment) == KEYS
        for part in (result, *result["segments"]):
            assert 0 <= part["agreement"] <= 1 and 0 < part["confidence"] <= 1
    assert [len(result["segments"]) for result in results][0] == 1
    assert results[0] == {**results[0]["segments"][0], "segments": results[0]["segments"]}


def test_long_audio_is_its_pieces_joined(tiny):
    audio = noise(3.3)
    (result,) = transcribe(tiny.model, tiny.processor, [audio], batch_size=2, sampling_rate=16_000)
    pieces = split_at_quiet_points(audio, 16_000)
    alone = transcribe(tiny.model, tiny.processor, [audio[start:end] for start, end in pieces], sampling_rate=16_000)
    assert len(pieces) > 3
    assert result["text"] == " ".join(one["text"] for one in alone if one["text"])
    assert result["hypothesis"] == " ".join(one["hypothesis"] for one in alone if one["hypothesis"])
    assert [(s["start"], s["end"]) for s in result["segments"]] == [(a / 16_000, b / 16_000) for a, b in pieces]
    assert [segment["text"] for segment in result["segments"]] == [one["text"] for one in alone]


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batched_clips_are_as_alone(batch_size, tiny, clips):
    mixed = [clips[0], noise(2.2), np.zeros(800, dtype=np.float32), clips[1], clips[2]]
    alone = [transcribe(tiny.model, tiny.processor, [clip], sampling_rate=16_000)[0] for clip in mixed]
    batched = transcribe(tiny.model, tiny.processor, mixed, batch_size=batch_size, sampling_rate=16_000)
    for one, other in zip(alone, batched, strict=True):
        assert (one["text"], one["hypothesis"], one["agreement"]) == (
            other["text"],
            other["hypothesis"],
            other["agreement"],
        )
        if one["segments"]:
            assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-4)
    assert len({one["text"] for one in alone}) > 3


@pytest.mark.parametrize("fusion_mode", ["full", "causal"])
def test_confidence_is_the_models_own_probability(fusion_mode, tiny, clips):
    """Against one teacher-forced pass over the text: exp of minus its loss, which also fixes T."""
    model, processor = tiny.model, tiny.processor
    options = {"sampling_rate": 16_000, "fusion_mode": fusion_mode, "max_new_tokens": 6, "prompt": "Λόγια:"}
    (result,) = transcribe(model, processor, [clips[1]], **options)
    inputs = processor.apply_transcription_request(clips[1], prompt="Λόγια:", sampling_rate=16_000)
    audio = model.listen(inputs["input_features"])
    counts = torch.tensor(processor.hypothesis_token_counts([result["hypothesis"]]))
    sequences = model.generate(**inputs, hypothesis_token_counts=counts, fusion_mode=fusion_mode, max_new_tokens=6)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), sequences], dim=-1)
    loss = model(
        input_ids=torch.cat([inputs["input_ids"], sequences], dim=-1),
        labels=labels,
        hypothesis_token_counts=counts,
        fusion_mode=fusion_mode,
        **audio,
    ).loss
    assert processor.decode(sequences[0]) == result["text"]
    assert result["confidence"] == pytest.approx(loss.neg().exp().item(), rel=1e-4)


def test_confidence_counts_no_padding(tiny, clips):
    """A clip that ends early beside one that goes on."""
    end = tiny.model.end_token_ids[0]

    def ending(ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[0, end] = scores[0].max() + (1 if ids.shape[1] == 3 else -50)
        return scores

    options = {"max_new_tokens": 5, "logits_processor": [ending]}
    beside, _ = transcribe(tiny.model, tiny.processor, clips[:2], batch_size=2, sampling_rate=16_000, **options)
    inputs = tiny.processor.apply_transcription_request(clips[0], sampling_rate=16_000)
    counts = torch.tensor(tiny.processor.hypothesis_token_counts([beside["hypothesis"]]))
    alone = tiny.model.generate(**inputs, hypothesis_token_counts=counts, return_dict_in_generate=True, **options)
    assert alone.sequences.shape == (1, 3) and alone.sequences[0, -1] == end
    assert beside["text"] == tiny.processor.decode(alone.sequences[0])
    assert beside["confidence"] == pytest.approx(alone.token_logprobs.mean().exp().item(), rel=1e-4)


def test_agreement(tiny, clips):
    (result,) = transcribe(tiny.model, tiny.processor, [clips[0]], sampling_rate=16_000)
    longer = max(len(result["text"]), len(result["hypothesis"]))
    assert result["agreement"] == pytest.approx(1 - edit_distance(result["text"], result["hypothesis"]) / longer)


@pytest.mark.parametrize(
    ("first", "second"),
    [("", ""), ("", "άλφα"), ("άλφα", ""), ("γάτα", "γάτες"), ("αβγ", "βγα"), ("ο σκύλος τρέχει", "το σκυλί έτρεχε")],
)
def test_edit_distance_by_recursion(first, second):
    @lru_cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    assert edit_distance(first, second) == distance(len(first), len(second))


# ---- many clips


def test_clips_are_read_a_few_batches_ahead(tiny, clips):
    read = []

    def source():
        for index in range(3 * BATCHES_AHEAD):
            read.append(index)
            yield clips[index % 3]

    for batch_size, ahead in ((1, 1), (2, 2 * BATCHES_AHEAD)):
        read.clear()
        results = transcribe_each(tiny.model, tiny.processor, source(), batch_size=batch_size, sampling_rate=16_000)
        assert read == []
        for _ in range(ahead):
            next(results)
            assert len(read) == ahead or ahead == 1
        assert len(list(results)) == 3 * BATCHES_AHEAD - ahead


@pytest.mark.parametrize(("caching", "sizes"), [("dynamic", [2, 2, 1]), ("static", [2, 2, 2])])
def test_batches_are_of_like_length_and_of_one_size_where_compiled(tiny, clips, monkeypatch, caching, sizes):
    """A batch takes as long as its longest text; what is compiled is so for one size of a batch."""
    mixed = [clips[index] for index in (0, 2, 0, 1, 2)]
    alone = transcribe(tiny.model, tiny.processor, mixed, sampling_rate=16_000)
    heard, listen = [], tiny.model.listen
    monkeypatch.setattr(
        tiny.model,
        "listen",
        lambda features, *args, **kwargs: heard.append(features) or listen(features, *args, **kwargs),
    )
    options = {"batch_size": 2, "sampling_rate": 16_000, "cache_implementation": caching}
    batched = transcribe(tiny.model, tiny.processor, mixed, **options)
    assert [result["text"] for result in batched] == [result["text"] for result in alone]
    assert [len(features) for features in heard] == sizes
    by_length = tiny.processor.feature_extractor([clips[2], clips[2]], sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(heard[0], by_length.input_features)


def test_a_bad_clip_is_named(tiny, clips):
    results = transcribe_each(tiny.model, tiny.processor, [clips[0], "no/such.wav"], sampling_rate=16_000)
    assert next(results)["end"] == 0.4
    with pytest.raises(FileNotFoundError, match="audio 1: there is no audio file 'no/such.wav'"):
        next(results)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        transcribe(tiny.model, tiny.processor, clips, batch_size=0)
