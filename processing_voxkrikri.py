"""Audio and text to model inputs, ids back to text.

* `load_audio` takes audio in whatever form it comes and gives mono samples at 16 kHz, or says what is wrong with it.
* There is no audio token: the audio reaches the LLM inside its layers, so that a prompt is text and nothing else.
* Two vocabularies: `tokenizer` is the LLM's, `speech_tokenizer` is Whisper's, which writes the hypothesis.
"""

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, WhisperFeatureExtractor


SAMPLE_RATE = 16_000  # Hz, Whisper's
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz; outside it the number is no sampling rate (16 for 16 kHz)
WORD_MARKS = ("\u0120", "\u2581")  # a space before a piece: of byte-level BPE, of SentencePiece
LONGEST_FILE = 2**40  # frames; libsndfile reports more where a header leaves the length open
PIPED_LENGTH = 0x7FFF0000  # bytes; programs that write WAV to a pipe put some such number for the unknown length
INTEGER_SCALES = {"uint8": (128, 128), "int16": (0, 2**15), "int32": (0, 2**31)}  # PCM: its zero, its full scale


def is_collection(audio) -> bool:
    """Whether `audio` holds many clips rather than being one: a list of numbers, an array or a dict is one."""
    if isinstance(audio, list | tuple):
        return not (audio and isinstance(audio[0], Real))
    if isinstance(audio, str | bytes | bytearray | dict | np.ndarray | torch.Tensor):
        return False
    return not hasattr(audio, "get_all_samples") and (hasattr(audio, "__iter__") or hasattr(audio, "__getitem__"))


def load_audio(audio, sampling_rate: int | None = None) -> np.ndarray:
    """One clip as mono samples at 16 kHz.

    Args:
        audio: a path; the bytes of a file; samples as an array, tensor or list, of shape `(samples,)` or with one or
            two channels on either axis, floats in [-1, 1] or integer PCM (int16, int32, uint8); a dict that holds one
            of these under "array" ("raw"), "bytes" or "path"; or a decoder with `get_all_samples()`, as `datasets`
            gives. Files are read by libsndfile (wav, flac, ogg, mp3), others by the ffmpeg program if it is installed.
        sampling_rate: of samples, in Hz, unless their dict has a "sampling_rate"; files carry their own.

    Returns:
        `(samples,)` float32, the channels averaged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: it is empty, truncated, not audio, not finite, of another shape or without a rate.
    """
    if isinstance(audio, dict):
        form = next((form for form in ("array", "raw", "bytes", "path") if audio.get(form) is not None), None)
        if form is None:
            raise ValueError(
                'a dict of audio needs samples under "array" and their "sampling_rate", or a file under "bytes" or '
                f'"path"; this one has the keys {sorted(map(str, audio))}'
            )
        audio, sampling_rate = audio[form], audio.get("sampling_rate") or sampling_rate
    if isinstance(audio, str | os.PathLike):
        samples, rate = _decode_file(_read_file(audio), f"'{os.fspath(audio)}'")
    elif isinstance(audio, bytes | bytearray):
        samples, rate = _decode_file(bytes(audio), f"the file of {len(audio)} bytes")
    elif hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        samples, rate = decoded.data.mean(dim=0).numpy(), decoded.sample_rate
    elif isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
        samples, rate = _mono_samples(audio), _check_rate(sampling_rate)
    else:
        raise TypeError(
            "audio must be a path, the bytes of a file, samples (array, tensor or list of floats), a dict with "
            f'"array", "bytes" or "path", or a decoder; got {type(audio).__name__}'
        )
    if not np.isfinite(samples).all():
        raise ValueError("the audio has NaN or infinite samples: repair the recording or the code that made it")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    if not samples.size:
        raise ValueError("the audio has no samples: give a clip that is not empty")
    return np.ascontiguousarray(samples, dtype=np.float32)


def load_audios(audios: Iterable, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """`load_audio` of one clip after the other, read when it is asked for; an error names the clip's index."""
    for index, audio in enumerate(audios):
        try:
            samples = load_audio(audio, sampling_rate)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise type(error)(f"audio {index}: {error}") from error
        yield samples


def _check_rate(sampling_rate: int | None) -> int:
    if sampling_rate is None:
        raise ValueError(
            'samples need their rate in Hz: pass sampling_rate=..., or {"array": samples, "sampling_rate": ...}'
        )
    if not isinstance(sampling_rate, Real) or not LOWEST_RATE <= sampling_rate <= HIGHEST_RATE:
        raise ValueError(
            f"sampling_rate must be a number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}, got {sampling_rate!r}"
        )
    return sampling_rate


def _mono_samples(audio: np.ndarray | torch.Tensor | list | tuple) -> np.ndarray:
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio  # numpy has no bfloat16
    samples = np.asarray(audio)
    if samples.dtype.name in INTEGER_SCALES:
        zero, full_scale = INTEGER_SCALES[samples.dtype.name]
        samples = (samples.astype(np.float32) - zero) / full_scale
    elif not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(
            f"samples must be floats in [-1, 1] or PCM of type {', '.join(INTEGER_SCALES)}; got {samples.dtype}"
        )
    if samples.ndim == 2 and samples.size:
        channels = [axis for axis in (0, 1) if samples.shape[axis] <= 2 < samples.shape[1 - axis]]
        if len(channels) != 1:
            raise ValueError(
                "samples of two dimensions are one clip of one or two channels, (channels, samples) or "
                f"(samples, channels); got {samples.shape}: average more channels first, give many clips as a list"
            )
        samples = samples.mean(axis=channels[0])
    elif samples.ndim != 1 and samples.size:
        raise ValueError(
            f"samples must have the shape (samples,), (channels, samples) or (samples, channels), got {samples.shape}"
        )
    if np.abs(samples[np.isfinite(samples)]).max(initial=0) > 100:
        raise ValueError("float samples lie in [-1, 1], these reach far beyond: give PCM as integers, or scale it")
    return samples.astype(np.float32)


def _read_file(path: str | os.PathLike) -> bytes:
    if str(path).startswith(("http://", "https://")):
        raise ValueError(f"'{path}' is an address: download the file first and give its path or its bytes")
    if os.path.isdir(path):
        raise ValueError(f"'{path}' is a folder: give the audio files in it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no audio file '{path}'")
    return Path(path).read_bytes()


def _decode_file(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Mono samples `(samples,)` and their rate."""
    if not data:
        raise ValueError(f"{name} is empty (0 bytes): give an audio file")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.SoundFileError:
        file = None
    if file is None or file.frames > LONGEST_FILE:
        return _decode_with_ffmpeg(data, name), SAMPLE_RATE
    with file:
        try:
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
        except soundfile.SoundFileError as error:
            raise ValueError(f"{name} is damaged or truncated ({error}): copy or record it again") from error
        if _is_truncated(data) or len(samples) < 0.99 * file.frames:
            raise ValueError(
                f"{name} is truncated: it holds {len(samples) / file.samplerate:.2f} s, less than its header says; "
                "copy or record it again"
            )
        return samples, file.samplerate


def _is_truncated(data: bytes) -> bool:
    """Whether a WAV, AIFF or Ogg file ends before its own sizes say. libsndfile reads what is there without a word."""
    if data[:4] in (b"RIFF", b"FORM"):
        declared = int.from_bytes(data[4:8], "little" if data[:4] == b"RIFF" else "big")
        return len(data) < declared < PIPED_LENGTH
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS\0")
        segments = data[page + 27 : page + 27 + data[page + 26]] if len(data) > page + 26 else b""
        return len(data) <= page + 26 or len(data) < page + 27 + data[page + 26] + sum(segments)
    return False


def _decode_with_ffmpeg(data: bytes, name: str) -> np.ndarray:
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError(
            f"{name} is not readable as wav, flac, ogg or mp3: it is no audio, or damaged, or in a format (m4a, webm "
            "...) that needs the ffmpeg program, which is not on the PATH"
        )
    with tempfile.TemporaryDirectory() as folder:  # a file, since some formats cannot be read from a pipe
        path = Path(folder) / "audio"
        path.write_bytes(data)
        source = ["-protocol_whitelist", "file", "-i", f"file:{path}"]  # a playlist must not reach the network
        target = ["-vn", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "pipe:1"]
        result = subprocess.run([program, "-nostdin", "-v", "error", *source, *target], capture_output=True)
    if result.returncode or not result.stdout:
        reason = result.stderr.decode(errors="replace").strip().splitlines() or ["no audio in it"]
        raise ValueError(f"{name} is no audio that libsndfile or ffmpeg can read: {reason[-1]}")
    return np.frombuffer(result.stdout, dtype="<f4")


class VoxKrikriProcessor(ProcessorMixin):
    """Whisper's features, the LLM's prompt and targets, and the text of both vocabularies.

    Args:
        feature_extractor: Whisper's; its window bounds a clip.
        tokenizer: the LLM's.
        speech_tokenizer: Whisper's, an object of its own; it is saved in the sub-folder `speech_tokenizer`.
    """

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        speech_tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__(feature_extractor, tokenizer, speech_tokenizer)
        if speech_tokenizer is tokenizer:
            raise ValueError("tokenizer (the LLM's) and speech_tokenizer (Whisper's) must be two objects: load each")
        if feature_extractor.sampling_rate != SAMPLE_RATE:
            raise ValueError(f"feature_extractor must work at {SAMPLE_RATE} Hz, got {feature_extractor.sampling_rate}")

    @property
    def start_token_id(self) -> int:
        """What every prompt starts with: the LLM's BOS or, where it has none, its padding or end token."""
        candidates = (self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        start = next((token for token in candidates if token is not None), None)
        if start is None:
            raise ValueError("the tokenizer has no BOS, padding or EOS token to start a text with: set its bos_token")
        return start

    @property
    def end_token_id(self) -> int:
        """What every target ends with: the LLM's EOS."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token to end a text with: set tokenizer.eos_token")
        return self.tokenizer.eos_token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "VoxKrikriProcessor":
        """As ProcessorMixin's. (The tokenizers see the model's config and would ask whether to run its code.)"""
        return super().from_pretrained(pretrained_model_name_or_path, **({"trust_remote_code": False} | kwargs))

    def __call__(
        self,
        audio=None,
        text: str | list[str] | None = None,
        prompt: str | list[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Model inputs for one clip or many.

        Args:
            audio: one clip, or many, in any form that `load_audio` takes, each no longer than the window.
            text: the transcripts, for training.
            prompt: text the LLM reads before the transcript, one for all or one each; by default its BOS alone.
            sampling_rate: of clips given as samples, in Hz.
            return_tensors: "pt" or "np".

        Returns:
            `input_features` (batch, mel bins, frames) if audio was given; `input_ids` and `attention_mask`
            (batch, tokens): the prompts, left-padded, or with `text` prompt, transcript and EOS, right-padded, and
            `labels` (batch, tokens), unshifted, with -100 on prompt and padding.

        Raises:
            ValueError: for a bad clip, one longer than the window, or arguments of different lengths.
        """
        clips = None if audio is None else list(audio) if is_collection(audio) else [audio]
        texts = self._strings("text", text)
        prompts = self._strings("prompt", prompt)
        sizes = {
            name: len(values)
            for name, values in (("audio", clips), ("text", texts), ("prompt", prompts))
            if values is not None and not (name == "prompt" and isinstance(prompt, str))
        }
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"audio, text and prompt need one entry a clip and at least one, got {sizes}")
        size = next(iter(sizes.values()), 1)
        prompts = (prompts or [""]) * (1 if "prompt" in sizes else size)
        rows = [[self.start_token_id, *self._text_ids(words)] for words in prompts]
        if texts is None:
            inputs = self._pad(rows)
        else:
            targets = [[*self._text_ids(words), self.end_token_id] for words in texts]
            labels = [[-100] * len(row) + target for row, target in zip(rows, targets, strict=True)]
            inputs = self._pad([row + target for row, target in zip(rows, targets, strict=True)], labels)
        if clips is not None:
            inputs["input_features"] = self._features(clips, sampling_rate)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def apply_transcription_request(
        self,
        audio,
        language: str | None = None,
        prompt: str | list[str] | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Inputs for `model.generate(**inputs)`; `language` is among them only if given."""
        inputs = self(audio=audio, prompt=prompt, sampling_rate=sampling_rate)
        if language is not None:
            inputs["language"] = language
        return inputs

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        sampling_rate: int | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_tensors: str | None = "pt",
        **template_kwargs,
    ) -> BatchFeature | str | list[str]:
        """Inputs for an instruct LLM from a conversation, or many, of which each holds one clip or all none.

        There is no audio token: {"type": "audio", "audio": clip} (or with the keys of a dict that `load_audio` takes)
        becomes `input_features` and leaves nothing in the text. What is rendered is the text alone, by the
        tokenizer's own chat template.

        Args:
            conversation: turns {"role", "content"}; a content is a text or a list of "text" and "audio" parts.
            sampling_rate: of a clip given as samples, in Hz.
            tokenize: False returns the rendered text.
            template_kwargs: further arguments of the tokenizer's template.

        Returns:
            `input_ids` and `attention_mask` (batch, tokens), left-padded, and `input_features`
            (batch, mel bins, frames).
        """
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        clips, texts = [], []
        for index, turns in enumerate(conversation if many else [conversation]):
            rendered, found = [], []
            for turn in turns:
                parts = turn["content"]
                parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
                strange = {part["type"] for part in parts} - {"audio", "text"}
                if strange:
                    raise ValueError(
                        f"conversation {index} has {sorted(strange)} parts: only audio and text are known"
                    )
                found += [part.get("audio", part) for part in parts if part["type"] == "audio"]
                words = "\n".join(part["text"] for part in parts if part["type"] == "text")
                rendered.append({**turn, "content": words})
            if len(found) > 1:
                raise ValueError(f"conversation {index} has {len(found)} clips: give one")
            clips += found
            texts.append(
                self.tokenizer.apply_chat_template(
                    rendered, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
                )
            )
        if clips and len(clips) < len(texts):
            raise ValueError(f"{len(clips)} of {len(texts)} conversations have a clip: give one to each, or to none")
        if not tokenize:
            return texts if many else texts[0]
        inputs = self._pad([self._text_ids(words) for words in texts])
        if clips:
            inputs["input_features"] = self._features(clips, sampling_rate)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        """The text of one row of the LLM's ids, without the white space around it."""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        ).strip()

    def batch_decode(self, sequences, skip_special_tokens: bool = True) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def decode_hypothesis(self, hypothesis_ids) -> str:
        """The text of one row of Whisper's ids, without its markers and the white space around it."""
        return self.speech_tokenizer.decode(
            hypothesis_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    def hypothesis_token_counts(self, hypotheses: list[str]) -> list[int]:
        """T for the alignment: the LLM tokens of every hypothesis text, its EOS counted."""
        return [len(self._text_ids(words)) + 1 for words in hypotheses]

    def draft(self, hypotheses: list[str]) -> dict[str, torch.Tensor]:
        """The hypotheses as targets of the LLM, for `generate` to verify.

        Returns:
            `draft_ids` (batch, n), each with its EOS, padded with -1, and `draft_word_starts` (batch, n).
        """
        ids = [torch.tensor([*self._text_ids(words), self.end_token_id]) for words in hypotheses]
        starts = []
        for row in ids:
            pieces = self.tokenizer.convert_ids_to_tokens(row.tolist())
            starts.append(torch.tensor([piece[:1] in WORD_MARKS for piece in pieces[:-1]] + [True]))
        return {
            "draft_ids": pad_sequence(ids, batch_first=True, padding_value=-1),
            "draft_word_starts": pad_sequence(starts, batch_first=True),
        }

    @staticmethod
    def _strings(name: str, value: str | list[str] | None) -> list[str] | None:
        if value is None:
            return None
        strings = [value] if isinstance(value, str) else list(value)
        wrong = [index for index, string in enumerate(strings) if not isinstance(string, str)]
        if wrong:
            raise TypeError(f"{name} {wrong[0]} must be a string, got {type(strings[wrong[0]]).__name__}")
        return strings

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _features(self, clips: list, sampling_rate: int | None) -> np.ndarray:
        window = self.feature_extractor.n_samples
        samples = list(load_audios(clips, sampling_rate))
        for index, clip in enumerate(samples):
            if len(clip) > window:
                raise ValueError(
                    f"audio {index} lasts {len(clip) / SAMPLE_RATE:.2f} s, Whisper's window {window / SAMPLE_RATE:g} s: "
                    "split it, or use the pipeline, which does"
                )
        return self.feature_extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features

    def _pad(self, rows: list[list[int]], labels: list[list[int]] | None = None) -> dict[str, np.ndarray]:
        """Prompts on the left, since decoding goes on at their right end; training rows on the right."""
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.end_token_id if pad_id is None else pad_id  # Llama-3 has none; the mask tells
        longest = max(len(row) for row in rows)

        def fill(values: list[list[int]], filler: int) -> np.ndarray:
            padding = [[filler] * (longest - len(row)) for row in values]
            pairs = zip(values, padding, strict=True)
            return np.array([pad + row if labels is None else row + pad for row, pad in pairs], dtype=np.int64)

        inputs = {"input_ids": fill(rows, pad_id), "attention_mask": fill([[1] * len(row) for row in rows], 0)}
        return inputs if labels is None else inputs | {"labels": fill(labels, -100)}


# Says nothing to the auto classes of this process: what is saved carries this file and names it for AutoProcessor.
VoxKrikriProcessor.register_for_auto_class("AutoProcessor")
