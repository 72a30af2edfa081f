"""From audio of any length to text, its segments and what is known of them.

The result of a clip is one dict, the same wherever it goes (pipeline, subtitles, tools):

    {"text", "hypothesis", "start", "end", "words", "agreement", "confidence", "speaker", "segments": [...]}

and each segment is such a dict without segments. Times are seconds. What is not known is None.

* hypothesis: Whisper's own text. agreement: 1 for the same text, 0 for nothing in common (edits per character).
* confidence: the geometric mean of the text tokens' probabilities, the end of text included.
* A segment is a piece of audio that Whisper heard at once: at most its window. Longer audio is cut where it is quietest.
* Silence (a peak below -60 dBFS, about the mean) has no segment: a Whisper asked about it would make words up.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .processing_voxkrikri import SAMPLE_RATE, load_audios


SILENCE_PEAK = 1e-3  # of full scale: -60 dBFS
BATCHES_AHEAD = 8  # read before the first is heard
QUIET_SPAN = SAMPLE_RATE // 5  # samples over which loudness is measured where audio is cut: 0.2 s


@dataclass
class Piece:
    """What Whisper hears at once, and what became of it (text is None until then)."""

    samples: np.ndarray
    start: float
    end: float
    text: str | None = None
    hypothesis: str | None = None
    token_logprobs: np.ndarray | None = None


def transcribe(model, processor, clips: Iterable, **kwargs) -> list[dict]:
    """The results of all clips: `transcribe_each` at once."""
    return list(transcribe_each(model, processor, clips, **kwargs))


def transcribe_each(
    model,
    processor,
    clips: Iterable,
    batch_size: int = 1,
    sampling_rate: int | None = None,
    language: str | None = None,
    prompt: str | None = None,
    **generate_kwargs,
) -> Iterator[dict]:
    """The result of one clip after the other. Batches are of pieces of like length, out of BATCHES_AHEAD read ahead.

    Args:
        clips: in any form that `load_audio` takes, of any length.
        batch_size: windows decoded together, of one clip or of several.
        sampling_rate: of clips given as samples, in Hz.
        language: of the speech, for a multilingual Whisper.
        prompt: text that the LLM reads before the transcript.
        generate_kwargs: options of `model.generate` (fusion_mode, num_beams, max_new_tokens ...).

    Raises:
        ValueError, TypeError, FileNotFoundError: for a bad clip, named by its index.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    options = {"language": language, "prompt": prompt, **generate_kwargs}
    unheard: list[Piece] = []
    unfinished: deque[tuple[float, list[Piece]]] = deque()
    ahead = batch_size if batch_size == 1 else BATCHES_AHEAD * batch_size
    for samples in load_audios(clips, sampling_rate):
        pieces = [
            Piece(samples[start:end], start / SAMPLE_RATE, end / SAMPLE_RATE)
            for start, end in split_at_quiet_points(samples, processor.feature_extractor.n_samples)
            if not is_silent(samples[start:end])
        ]
        unheard += pieces
        unfinished.append((len(samples) / SAMPLE_RATE, pieces))
        while len(unheard) >= ahead:
            _transcribe_pieces(model, processor, unheard[:ahead], batch_size, **options)
            del unheard[:ahead]
        while unfinished and all(piece.text is not None for piece in unfinished[0][1]):
            yield _clip_result(*unfinished.popleft())
    if unheard:
        _transcribe_pieces(model, processor, unheard, batch_size, **options)
    for clip in unfinished:
        yield _clip_result(*clip)


def is_silent(samples: np.ndarray) -> bool:
    """Whether nothing in `(samples,)` is louder than -60 dBFS once a constant offset is taken away."""
    return bool(np.abs(samples - samples.mean()).max() < SILENCE_PEAK)


def split_at_quiet_points(samples: np.ndarray, longest: int) -> list[tuple[int, int]]:
    """Cuts `(samples,)` into pieces (start, end) that cover it without gap or overlap, none above `longest` samples.

    Every cut is at the quietest point of the last third of a window, and not so late that a mere scrap is left over.
    """
    pieces, start = [], 0
    while len(samples) - start > longest:
        earliest = start + 2 * longest // 3
        latest = min(start + longest, len(samples) - longest // 6)
        cut = _quietest_point(samples, earliest, latest)
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(samples))]


def _quietest_point(samples: np.ndarray, earliest: int, latest: int) -> int:
    """The sample from `earliest` to `latest` with the least power around it; of equals, the last."""
    first = max(earliest - QUIET_SPAN // 2, 0)
    around = samples[first : latest + QUIET_SPAN // 2].astype(np.float64)
    energy = np.concatenate([[0.0], np.cumsum(around**2)])
    points = np.arange(latest, earliest - 1, -1)
    left = np.maximum(points - QUIET_SPAN // 2, first) - first
    right = np.minimum(points + QUIET_SPAN // 2, first + len(around)) - first
    return int(points[np.argmin((energy[right] - energy[left]) / (right - left))])


def _transcribe_pieces(model, processor, pieces: list[Piece], batch_size: int, **options) -> None:
    """Batch by batch, those of like length together: a batch takes as long as its longest text."""
    ordered = sorted(pieces, key=lambda piece: len(piece.samples), reverse=True)
    static = model.caching_options(**options)["cache_implementation"] == "static"
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        # Compiled for one size of a batch: the last one is filled up with a clip that is heard again.
        surplus = batch_size - len(batch) if static else 0
        _transcribe_batch(model, processor, batch + batch[-1:] * surplus, **options)


def _transcribe_batch(
    model, processor, pieces: list[Piece], language: str | None, prompt: str | None, **generate_kwargs
) -> None:
    inputs = processor(audio=[piece.samples for piece in pieces], prompt=prompt, sampling_rate=SAMPLE_RATE)
    inputs = inputs.to(model.device)
    audio = model.listen(inputs.pop("input_features"), language, **model.caching_options(**generate_kwargs))
    hypotheses = [processor.decode_hypothesis(ids) for ids in audio.hypothesis_ids]
    counts = torch.tensor(processor.hypothesis_token_counts(hypotheses), device=model.device)
    options = {**processor.draft(hypotheses), "hypothesis_token_counts": counts, **generate_kwargs}
    output = model.generate(**inputs, **audio, return_dict_in_generate=True, **options)
    rows = zip(pieces, hypotheses, output.sequences.cpu(), output.token_logprobs.float().cpu(), strict=True)
    for piece, hypothesis, ids, logprobs in rows:
        ends = torch.isin(ids, torch.tensor(model.end_token_ids)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        piece.text, piece.hypothesis = processor.decode(ids), hypothesis
        piece.token_logprobs = logprobs[:length].numpy()


def _clip_result(duration: float, pieces: list[Piece]) -> dict:
    segments = [_result([piece], piece.start, piece.end) for piece in pieces]
    return _result(pieces, 0.0, duration) | {"segments": segments}


def _result(pieces: list[Piece], start: float, end: float) -> dict:
    agreement = confidence = None
    if pieces:
        characters = sum(max(len(piece.text), len(piece.hypothesis)) for piece in pieces)
        edits = sum(edit_distance(piece.text, piece.hypothesis) for piece in pieces)
        agreement = 1 - edits / max(characters, 1)
        confidence = float(np.exp(np.concatenate([piece.token_logprobs for piece in pieces]).mean()))
    return {
        "text": " ".join(piece.text for piece in pieces if piece.text),
        "hypothesis": " ".join(piece.hypothesis for piece in pieces if piece.hypothesis),
        "start": start,
        "end": end,
        "words": None,
        "agreement": agreement,
        "confidence": confidence,
        "speaker": None,
    }


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the characters to insert, delete or replace to turn one text into the other."""
    letters = np.array(list(second), dtype="U1")
    columns = np.arange(len(second) + 1)
    row = columns
    for letter in first:
        above = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        above = np.concatenate([row[:1] + 1, above])
        row = np.minimum.accumulate(above - columns) + columns  # insertions: one more for every column to the right
    return int(row[-1])
