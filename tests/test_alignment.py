"""Rows and states by a ratio of lengths, and by the place in the hypothesis that the text has reached."""

import random

import pytest
import torch
from conftest import assemble
from torch.nn.utils.rnn import pad_sequence

from voxkrikri.alignment_voxkrikri import (
    TextFollower,
    aligned_states,
    alignment_mask,
    next_tokens,
    spell,
    text_aligned_states,
    token_bytes,
)


@pytest.mark.parametrize("lookahead", [0, 1, 3, 50])
def test_ratio_alignment_is_equation_3(lookahead):
    sizes = [(1, 1), (1, 9), (5, 3), (7, 7), (12, 5), (230, 97)]  # S, T
    positions = torch.arange(-1, 20).expand(len(sizes), -1)
    lengths, counts = torch.tensor(sizes).T
    aligned, centres = aligned_states(positions, lengths, counts, 1.0)
    last = torch.minimum(aligned + lookahead, lengths[:, None] - 1)
    mask = alignment_mask(positions, last, 230)
    for clip, (size, count) in enumerate(sizes):
        for row, t in enumerate(range(-1, 20)):
            s_t = 0 if t < 0 else min(size - 1, (size * t) // count + lookahead)
            assert mask[clip, row].tolist() == [s <= s_t for s in range(230)]
            assert centres[clip, row].item() == pytest.approx((t + 0.5) * size / count)


def test_without_token_counts_the_constant_stands_in():
    positions, lengths = torch.arange(9)[None], torch.tensor([100])
    aligned, centres = aligned_states(positions, lengths, None, 1.25)
    assert aligned[0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    assert centres[0].tolist() == [1.25 * (t + 0.5) for t in range(9)]


def test_text_alignment_is_a_loop_over_bytes():
    hypothesis, text = [3, 0, 2, 4, 1], [2, 2, 0, 5, 1, 3, 3]  # bytes each token writes
    starts = torch.tensor([[sum(hypothesis[:s]) for s in range(len(hypothesis) + 1)]])
    reached = torch.tensor([[sum(text[:t]) for t in range(len(text) + 1)]])
    aligned, centres = text_aligned_states(reached, starts, torch.tensor([len(hypothesis) + 1]))
    for t in range(len(text) + 1):
        started = [s for s in range(len(hypothesis) + 1) if sum(hypothesis[:s]) <= sum(text[:t])]
        assert aligned[0, t] == max(started)
        assert centres[0, t] == max(started)


def edit_distance(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


@pytest.mark.parametrize("seed", range(20))
def test_the_text_stands_where_the_edit_distance_is_smallest(seed):
    rng = random.Random(seed)
    hypothesis, text = (bytes(rng.choices(b"abc ", k=rng.randrange(30))) for _ in range(2))
    follower, place = TextFollower(hypothesis), 0
    for size in range(1, len(text) + 1):
        near = range(min(len(hypothesis), place + TextFollower.AHEAD - 1) + 1)
        place = min(near, key=lambda j: (edit_distance(text[:size], hypothesis[:j]), -j))
        assert follower.read(text[size - 1 : size]) == place


def test_following_goes_on_from_a_copy():
    text, whole = "η θάλασσα ήταν ήσυχη".encode(), TextFollower("η θαλασσα είναι ήσυχη".encode())
    half = TextFollower("η θαλασσα είναι ήσυχη".encode())
    half.read(text[:9])
    twin = half.copy()
    twin.read(b"quite another text")
    half.read(text[9:])
    assert half.read(b"") == whole.read(text)


def test_after_a_word_of_another_length_the_texts_run_together_again():
    hypothesis, text = "ο Σωτηρόπουλος πήγε εκεί".encode(), "ο ο Σωτήρης μου πήγε εκεί".encode()
    follower = TextFollower(hypothesis)
    follower.read(text[: text.index(" εκεί".encode())])
    assert follower.reached == hypothesis.index(" εκεί".encode())


@pytest.mark.parametrize("seed", range(10))
def test_what_lies_far_ahead_in_the_hypothesis_changes_nothing(seed):
    """A stream that knows AHEAD bytes beyond where the text stands follows as if it knew all."""
    rng = random.Random(seed)
    hypothesis, text = (bytes(rng.choices(b"ab ", k=60)) for _ in range(2))
    follower = TextFollower(hypothesis)
    for size in range(1, len(text) + 1):
        known = follower.reached + TextFollower.AHEAD
        place = follower.read(text[size - 1 : size])
        partial = TextFollower(hypothesis[:known] + bytes(rng.choices(b"xyz", k=5)))
        for byte in text[:size]:
            partial.read(bytes([byte]))
        assert partial.reached == place


def test_rows_of_a_text_stand_where_its_own_words_begin(tokenizers):
    """Where the hypothesis has the text's words, a row lies at the token that goes on from there."""
    model = assemble(tokenizers, alignment="text", fusion_mode="causal")
    text = tokenizers.text("Η θάλασσα ήταν ήσυχη", add_special_tokens=False).input_ids
    hypothesis = tokenizers.speech("Η θάλασσα ήταν ήσυχη χθες", add_special_tokens=False).input_ids
    prompt = tokenizers.text("Πότε;").input_ids
    input_ids, hypothesis_ids = torch.tensor([[*prompt, *text]]), torch.tensor([hypothesis])
    positions = torch.tensor([[-1] * (len(prompt) - 1) + list(range(len(text) + 1))])
    reached = model.follow_hypothesis(input_ids, positions, hypothesis_ids)
    aligned, _ = model.align(positions, torch.tensor([len(hypothesis) + 1]), reached, hypothesis_ids)
    for t in range(len(text) + 1):
        written = len(tokenizers.text.decode(text[:t]).encode())
        starts = [len(tokenizers.speech.decode(hypothesis[:s]).encode()) for s in range(len(hypothesis) + 1)]
        assert aligned[0, len(prompt) - 1 + t] == max(s for s, start in enumerate(starts) if start <= written)


def test_wrong_input_tokens_do_not_mislead_the_alignment(tokenizers, monkeypatch):
    """In training the LLM may read noise; the place in the hypothesis is that of the labels."""
    model = assemble(tokenizers, alignment="text")
    text = tokenizers.text("Η θάλασσα ήταν ήσυχη").input_ids
    hypothesis_ids = torch.tensor([tokenizers.speech("Η θάλασσα ήταν ήσυχη", add_special_tokens=False).input_ids])
    input_ids, labels = torch.tensor([text]), torch.tensor([[-100, *text[1:]]])
    states = hypothesis_ids.shape[1] + 1
    audio = {
        "audio_states": torch.randn(1, states, model.config.speech_config.d_model),
        "state_lengths": torch.tensor([states]),
        "hypothesis_ids": hypothesis_ids,
    }
    reached = []
    monkeypatch.setattr(
        model,
        "follow_hypothesis",
        lambda *args: reached.append(type(model).follow_hypothesis(model, *args)) or reached[-1],
    )
    noisy = input_ids.clone()
    noisy[:, 2::2] = 7
    for ids in (input_ids, noisy):
        model(input_ids=ids, labels=labels, **audio)
    assert torch.equal(*reached)
    assert reached[0].max() > 10


def test_the_next_token_is_the_longest_that_is_visible():
    vocabulary = {b"a": 0, b"ab": 1, b"abc": 2, b"c": 3}
    assert next_tokens(b"abcxab", [0, 0, 0, 2, 3, 4, 6], [6, 2, 0, 6, 6, 6, 6], vocabulary) == [2, 1, -1, 3, -1, 1, -1]


def test_copying_row_by_row_writes_the_hypothesis(tokenizers):
    """Each row is shown the token that goes on from what the rows before were shown; at last the end."""
    model = assemble(tokenizers, alignment="text", copy_hypothesis=True)
    speech, text = tokenizers.speech, tokenizers.text
    hypothesis_ids = torch.tensor([speech("Η θάλασσα ήταν ήσυχη", add_special_tokens=False).input_ids])
    states = torch.tensor([hypothesis_ids.shape[1] + 1])
    ids = [text.bos_token_id]
    while ids[-1] not in model.end_token_ids:
        reached = model.follow_hypothesis(torch.tensor([ids]), torch.arange(len(ids))[None], hypothesis_ids)
        shown = model.copied_tokens(reached, (states - 1).expand(1, len(ids)), hypothesis_ids, states)
        assert shown[0, :-1].tolist() == ids[1:]
        ids.append(int(shown[0, -1]))
    assert text.decode(ids[1:-1]).strip() == "Η θάλασσα ήταν ήσυχη"


@pytest.mark.parametrize("options", [{}, {"fusion_mode": "causal"}, {"num_beams": 2}, {"use_cache": False}])
def test_a_large_bias_writes_the_hypothesis_and_none_does_not(tokenizers, options):
    model = assemble(tokenizers, alignment="text", alignment_lookahead=6, copy_hypothesis=True, copy_bias=50.0)
    texts = ["Η θάλασσα ήταν ήσυχη", "Ναι"]
    ids = [torch.tensor(tokenizers.speech(text, add_special_tokens=False).input_ids) for text in texts]
    audio = {
        "audio_states": torch.randn(2, len(ids[0]) + 1, model.config.speech_config.d_model),
        "state_lengths": torch.tensor([len(row) + 1 for row in ids]),
        "hypothesis_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizers.speech.eos_token_id),
    }
    written = model.generate(**audio, max_new_tokens=30, **options)
    assert [text.strip() for text in tokenizers.text.batch_decode(written, skip_special_tokens=True)] == texts
    assert not torch.equal(model.generate(**audio, max_new_tokens=30, copy_bias=0.0, **options), written)


def test_what_a_row_is_shown_of_the_hypothesis_stands_in_the_states_it_sees(tokenizers):
    model = assemble(tokenizers, alignment="text", copy_hypothesis=True)
    spell_out = tokenizers.speech.convert_tokens_to_ids  # in pieces of one byte: the LLM's are longer
    ids = torch.tensor([spell_out(list("".join(tokenizers.speech.tokenize(" Η θάλασσα ήταν ήσυχη"))))])
    states, beginning = torch.tensor([ids.shape[1] + 1]), torch.zeros(1, 1, dtype=torch.long)
    shown = {}
    for seen in range(ids.shape[1]):
        shown[seen] = model.copied_tokens(beginning, torch.tensor([[seen]]), ids, states).item()
        later = torch.cat([ids[:, : seen + 1], ids[:, seen + 1 :].flip(1)], dim=1)
        assert model.copied_tokens(beginning, torch.tensor([[seen]]), later, states).item() == shown[seen]
    assert len(set(shown.values())) > 1


@pytest.mark.parametrize("text", ["Η θάλασσα ήταν ήσυχη.", "ᾠδή: 5 € στο «𝄞»"])
def test_bytes_of_tokens_spell_the_text(tokenizers, text):
    for tokenizer in (tokenizers.text, tokenizers.speech):
        table = token_bytes(tokenizer, len(tokenizer)).numpy()
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ("\ufffd" in "".join(tokenizer.decode([token]) for token in ids)) == ("𝄞" in text)
        assert spell(table[ids]).decode() == " " + text
        assert not table[tokenizer.all_special_ids].any()
