"""Synthesises the mini's speech: a text file becomes FLAC clips and a manifest with word times.

    python -m recipes.mini.speak --text speech_train.txt --group speech --renderings 5 --out data/speech

* espeak-ng speaks (libespeak-ng through ctypes: its callback tells when each word starts, the command line does not).
* Three groups of voices and rates, disjoint, so that every stage is tested on voices that it never heard.
* Every rendering draws a voice, rate, pitch, level and, by chance, a room, a telephone band and noise at 0-20 dB.
* One noise kind and one room are heard in the test group alone.
* Every draw comes from (seed, clip number): a run that was cut off goes on, and gives the same clips.
"""

import argparse
import ctypes
import ctypes.util
import json
import multiprocessing
import re
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.signal import butter, fftconvolve, sosfilt
from tqdm import tqdm


SAMPLE_RATE = 16_000  # Hz, what Whisper hears
CLIPS_PER_PART = 200  # a part is written whole or not at all
MAX_JOINED_WORDS = 22  # two sentences share a window only if they are likely to fit

VOICES = {
    "speech": [
        "m1",
        "m2",
        "m3",
        "m4",
        "f1",
        "f2",
        "f3",
        "Alex",
        "Andrea",
        "michael",
        "Diogo",
        "Gene",
        "Jacky",
        "linda",
        "mario",
        "antonio",
        "robert",
        "shelby",
    ],
    "fusion": ["m5", "m6", "f4", "Alicia", "Marco", "Hugo", "steph", "Lee", "max", "benjamin", "john", "aunty"],
    "test": ["m7", "m8", "f5", "Annie", "Denis", "victor", "belinda", "pablo", "edward"],
}
RATES = {  # espeak words per minute
    "speech": (150, 160, 170, 180, 190, 200, 210),
    "fusion": (155, 165, 175, 185, 195, 205),
    "test": (158, 168, 178, 188, 198),
}
NOISES = ("white", "pink", "brown", "babble", "hum", "music", "clicks")
ROOMS = (0.2, 0.35, 0.5, 0.65, 0.8)  # RT60 in seconds
TEST_NOISE = "traffic"
TEST_ROOM = 0.75  # and with distinct early echoes, as a stairwell has them
GREEK_SENTENCE = re.compile(r"[\sΆ-ώ.,;:!·«»'’()\-—]+")
NOISE_SHARE, ROOM_SHARE, TELEPHONE_SHARE, EMPTY_SHARE, JOINED_SHARE = 0.5, 0.35, 0.1, 0.05, 0.5


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; positions count characters from 1, times are milliseconds."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


class Espeak:
    """Speech from libespeak-ng (one per process: the library keeps its state in globals)."""

    SYNCHRONOUS, UTF8, POSITION_CHARACTER = 2, 1, 1
    RATE, PITCH, RANGE = 1, 3, 4
    EVENT_LIST_TERMINATED, EVENT_WORD = 0, 1

    def __init__(self):
        name = ctypes.util.find_library("espeak-ng")
        if name is None:
            raise RuntimeError("libespeak-ng was not found: install the package espeak-ng")
        self.library = ctypes.CDLL(name)
        self.rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, None, 0)
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = callback(self._receive)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != self.EVENT_LIST_TERMINATED:
            if events[index].type == self.EVENT_WORD:
                self._words.append((events[index].text_position - 1, events[index].audio_position / 1000))
            index += 1
        return 0

    def speak(
        self, text: str, language: str, voice: str, rate: int, pitch: int
    ) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """Returns samples (n,) at 16 kHz in [-1, 1] and (first character, start in seconds) of every word spoken."""
        self._samples, self._words = [], []
        if self.library.espeak_SetVoiceByName(f"{language}+{voice}".encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {language}+{voice}")
        self.library.espeak_SetParameter(self.RATE, rate, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, self.POSITION_CHARACTER, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        samples = np.concatenate(self._samples).astype(np.float32) / 32768
        return soxr.resample(samples, self.rate, SAMPLE_RATE), self._words


@cache
def espeak() -> Espeak:
    return Espeak()


def word_times(text: str, starts: list[tuple[int, float]], duration: float) -> list[dict]:
    """Start and end in seconds of every whitespace-separated word that was voiced; a word ends where the next begins."""
    spans, position = [], 0
    for word in text.split():
        first = text.index(word, position)
        position = first + len(word)
        voiced = [start for character, start in starts if first <= character < position]
        if voiced:
            spans.append((word, voiced[0]))
    ends = [start for _, start in spans[1:]] + [duration]
    return [{"word": w, "start": round(s, 3), "end": round(e, 3)} for (w, s), e in zip(spans, ends, strict=True)]


def coloured_noise(rng: np.random.Generator, count: int, exponent: float) -> np.ndarray:
    """Noise of power spectrum 1 / f^exponent: 0 is white, 1 pink, 2 brown."""
    frequencies = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 20)
    spectrum = np.fft.rfft(rng.standard_normal(count)) / frequencies ** (exponent / 2)
    return np.fft.irfft(spectrum, count)


def make_noise(
    kind: str, count: int, rng: np.random.Generator, texts: list[str], language: str, group: str
) -> np.ndarray:
    """One of NOISES or TEST_NOISE, (count,), at any level."""
    time = np.arange(count) / SAMPLE_RATE
    if kind in ("white", "pink", "brown"):
        return coloured_noise(rng, count, {"white": 0, "pink": 1, "brown": 2}[kind])
    if kind == "babble":
        noise = np.zeros(count)
        for _ in range(5):
            voice, rate = rng.choice(VOICES[group]), int(rng.choice(RATES[group]))
            talker, _ = espeak().speak(
                texts[rng.integers(len(texts))], language, voice, rate, int(rng.integers(30, 70))
            )
            noise += rng.uniform(0.4, 1) * np.roll(np.resize(talker, count), rng.integers(count))
        return noise
    if kind == "hum":
        mains = sum(np.sin(2 * np.pi * 50 * k * time + rng.uniform(0, 6.3)) / k for k in range(1, 12))
        return mains + 0.1 * coloured_noise(rng, count, 1)
    if kind == "music":
        noise, beat = np.zeros(count), int(rng.uniform(0.2, 0.5) * SAMPLE_RATE)
        for first in range(0, count, beat):
            span = time[: min(beat, count - first)]
            for semitone in rng.choice([0, 2, 4, 5, 7, 9, 11, 12], size=3, replace=False):
                pitch = 220 * 2 ** (semitone / 12)
                tone = sum(np.sin(2 * np.pi * pitch * k * span) / k**1.5 for k in (1, 2, 3, 4))
                noise[first : first + len(span)] += tone * np.exp(-3 * span)
        return noise
    if kind == "clicks":
        noise = 0.01 * coloured_noise(rng, count, 1)
        burst = np.exp(-np.arange(400) / 60)
        for first in rng.integers(0, max(1, count - 400), size=max(1, int(6 * count / SAMPLE_RATE))):
            noise[first : first + 400] += (rng.standard_normal(400) * burst)[: count - first]
        return noise
    if kind == TEST_NOISE:
        swell = 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * time + rng.uniform(0, 6.3))
        engine = sum(np.sin(2 * np.pi * rng.uniform(60, 90) * k * time) / k for k in range(1, 8))
        road = sosfilt(butter(2, [100, 1500], "bandpass", fs=SAMPLE_RATE, output="sos"), rng.standard_normal(count))
        return swell * (road + 0.2 * engine)
    raise ValueError(f"unknown noise kind {kind!r}")


def room_response(rt60: float, rng: np.random.Generator) -> np.ndarray:
    """An impulse response: the direct sound, then a noise tail that falls by 60 dB in rt60 seconds."""
    count = int(rt60 * SAMPLE_RATE)
    tail = rng.standard_normal(count) * 10 ** (-3 * np.arange(count) / count)
    tail[: int(0.003 * SAMPLE_RATE)] = 0
    tail *= rng.uniform(0.3, 0.8) / np.linalg.norm(tail)
    if rt60 == TEST_ROOM:
        for delay, level in ((0.021, 0.5), (0.034, 0.4), (0.055, 0.3)):
            tail[int(delay * SAMPLE_RATE)] += level
    tail[0] = 1
    return tail


def make_clip(
    text: str, language: str, group: str, rng: np.random.Generator, texts: list[str]
) -> tuple[np.ndarray, dict]:
    """Speaks `text` once as a voice of `group` in a drawn acoustic; empty text gives silence or noise alone."""
    noises = NOISES + ((TEST_NOISE,) if group == "test" else ())
    rooms = ROOMS + ((TEST_ROOM,) if group == "test" else ())
    entry = {"text": text, "voice": None, "rate": None, "words": [], "room": None, "telephone": False, "noise": None}
    if text:
        entry["voice"], entry["rate"] = str(rng.choice(VOICES[group])), int(rng.choice(RATES[group]))
        speech, starts = espeak().speak(text, language, entry["voice"], entry["rate"], int(rng.integers(30, 71)))
        lead, rest = rng.uniform(0.05, 0.3, size=2)
        audio = np.pad(speech, (int(lead * SAMPLE_RATE), int(rest * SAMPLE_RATE)))
        starts = [(character, start + lead) for character, start in starts]
        entry["words"] = word_times(text, starts, lead + len(speech) / SAMPLE_RATE)
    else:
        audio = np.zeros(int(rng.uniform(0.5, 8) * SAMPLE_RATE))
    entry["duration"] = round(len(audio) / SAMPLE_RATE, 3)
    if text and rng.random() < ROOM_SHARE:
        entry["room"] = float(rng.choice(rooms))
        audio = fftconvolve(audio, room_response(entry["room"], rng))[: len(audio)]
    if rng.random() < (NOISE_SHARE if text else 0.8):
        entry["noise"], entry["snr"] = str(rng.choice(noises)), round(float(rng.uniform(0, 20)), 1)
        noise = make_noise(entry["noise"], len(audio), rng, texts, language, group)
        level = np.sqrt(np.mean(audio**2)) if text else 0.1
        audio = audio + noise * level / (np.sqrt(np.mean(noise**2)) + 1e-9) / 10 ** (entry["snr"] / 20)
    if rng.random() < TELEPHONE_SHARE:
        entry["telephone"] = True
        audio = sosfilt(butter(4, [300, 3400], "bandpass", fs=SAMPLE_RATE, output="sos"), audio)
    peak = np.abs(audio).max()
    return (audio * rng.uniform(0.1, 0.9) / peak if peak > 0 else audio), entry


def greek_sentences(lines: list[str]) -> list[str]:
    """The sentences of three words or more in running text that are Greek throughout: no numerals, no Latin."""
    sentences = [sentence.strip() for line in lines for sentence in re.split(r"(?<=[.;!])\s+", line)]
    return [sentence for sentence in sentences if len(sentence.split()) > 2 and GREEK_SENTENCE.fullmatch(sentence)]


def plan_texts(texts: list[str], renderings: int, join: bool, seed: int) -> list[str]:
    """The text of every clip: each sentence `renderings` times, some joined to a second one, some clips empty."""
    rng, plan = np.random.default_rng(seed), []
    for _ in range(renderings):
        queue = [texts[index] for index in (rng.permutation(len(texts)) if join else range(len(texts)))]
        while queue:
            text = queue.pop(0)
            short = queue and len(text.split()) + len(queue[0].split()) <= MAX_JOINED_WORDS
            if join and short and rng.random() < JOINED_SHARE:
                text = f"{text} {queue.pop(0)}"
            plan.append(text)
            if join and rng.random() < EMPTY_SHARE:
                plan.append("")
    return plan


def write_part(task: tuple) -> Path:
    """Speaks one part of the plan into `out`/NNNN/*.flac and, last and whole, its manifest `out`/NNNN.jsonl."""
    part, plan, texts, language, group, seed, out = task
    manifest = out / f"{part:04d}.jsonl"
    if manifest.exists():
        return manifest
    folder, lines = out / f"{part:04d}", []
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(plan):
        rng = np.random.default_rng((seed, part, index))
        audio, entry = make_clip(text, language, group, rng, texts)
        path = folder / f"{index:03d}.flac"
        soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
        lines.append(json.dumps({"audio": str(path.relative_to(out)), **entry}, ensure_ascii=False))
    partial = manifest.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(manifest)
    return manifest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for FLAC files and manifest.jsonl")
    parser.add_argument("--group", choices=tuple(VOICES), required=True, help="whose voices and rates speak")
    parser.add_argument("--language", default="el", help="a language of espeak-ng")
    parser.add_argument("--renderings", type=int, default=1, help="how often each sentence is spoken")
    parser.add_argument("--single", action="store_true", help="each sentence in its own clip, in order, none empty")
    parser.add_argument(
        "--sentences", action="store_true", help="split running Greek text, leave out numerals and Latin"
    )
    parser.add_argument("--max-words", type=int, default=24, help="longer lines are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)

    lines = [line.strip() for line in args.text.read_text(encoding="utf-8").splitlines()]
    if args.sentences:
        lines = greek_sentences(lines)
    texts = [line for line in lines if line and len(line.split()) <= args.max_words]
    if not texts:
        parser.error(f"{args.text} holds no line of 1 to {args.max_words} words")
    plan = plan_texts(texts, args.renderings, join=not args.single, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [
        (part, plan[first : first + CLIPS_PER_PART], texts, args.language, args.group, args.seed, args.out)
        for part, first in enumerate(range(0, len(plan), CLIPS_PER_PART))
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        parts = list(tqdm(pool.imap(write_part, tasks), total=len(tasks), unit="part", desc=str(args.out)))
    entries = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    partial = args.out / "manifest.partial"
    partial.write_text("\n".join(entries) + "\n", encoding="utf-8")
    partial.replace(args.out / "manifest.jsonl")
    hours = sum(json.loads(entry)["duration"] for entry in entries) / 3600
    print(f"{len(entries)} clips, {hours:.2f} hours: {args.out / 'manifest.jsonl'}")


if __name__ == "__main__":
    main()
