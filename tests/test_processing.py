import copy
import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from voxkrikri import VoxKrikriProcessor
from voxkrikri.processing_voxkrikri import is_collection, load_audio


GREEK = "Ο Οδυσσέας, ο γιος του Λαέρτη, ρώτησε: «πώς;»· και ΰστερα σώπασε."
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[γράψε]{% endif %}"
)


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16_000, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", "subtype": "PCM_16"} | options)
    return file.getvalue()


class Decoder:
    """What `datasets` and torchcodec give for an audio column."""

    def __init__(self, samples: np.ndarray, rate: int):
        self.samples = SimpleNamespace(data=torch.from_numpy(samples), sample_rate=rate)

    def get_all_samples(self) -> SimpleNamespace:
        return self.samples

    def __getitem__(self, key):
        raise AssertionError("a decoder is one clip")


@pytest.fixture
def without_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


# ---- audio


def test_every_form_of_audio_gives_the_same_samples(tmp_path):
    data = encoded(tone(16_000))
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    pcm, _ = soundfile.read(path, dtype="int16")
    samples = pcm / np.float32(2**15)
    forms = {
        "str": str(path),
        "path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "path dict": {"path": str(path), "bytes": None},
        "bytes dict": {"path": "gone.wav", "bytes": data},
        "array dict": {"array": samples, "sampling_rate": 16_000, "path": "gone.wav"},
        "raw dict": {"raw": samples.tolist(), "sampling_rate": 16_000},
        "decoder": Decoder(samples[None], 16_000),
    }
    of_a_rate = {
        "float32": samples,
        "float64": samples.astype(np.float64),
        "int16": pcm,
        "int32": pcm.astype(np.int32) << 16,
        "tensor": torch.from_numpy(samples),
        "int tensor": torch.from_numpy(pcm),
        "list": samples.tolist(),
        "tuple": tuple(samples.tolist()),
        "rateless dict": {"array": samples, "sampling_rate": None},
    }
    loaded = {name: load_audio(form) for name, form in forms.items()}
    loaded |= {name: load_audio(form, 16_000) for name, form in of_a_rate.items()}
    for name, form in (forms | of_a_rate).items():
        assert not is_collection(form), name
        assert loaded[name].dtype == np.float32 and loaded[name].flags.c_contiguous, name
        np.testing.assert_array_equal(loaded[name], samples, err_msg=name)


def test_eight_bit_samples_are_centred():
    np.testing.assert_allclose(
        load_audio(np.array([0, 128, 255] * 10, dtype=np.uint8), 16_000)[:3], [-1, 0, 127 / 128]
    )


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_every_rate_becomes_16_khz(rate):
    loaded = load_audio(encoded(tone(rate), rate))
    assert abs(len(loaded) - 8_000) <= 1
    inside = slice(800, 7_200)  # a resampler rings at the ends
    np.testing.assert_allclose(loaded[inside], tone(16_000)[inside], atol=2e-3)
    np.testing.assert_allclose(load_audio(tone(rate), rate)[inside], tone(16_000)[inside], atol=2e-3)


@pytest.mark.parametrize("options", [{"format": "FLAC"}, {"format": "OGG", "subtype": "VORBIS"}, {"format": "MP3"}])
def test_formats_that_need_no_ffmpeg(options, without_ffmpeg):
    loaded = load_audio(encoded(tone(16_000), **{"subtype": None} | options))
    assert np.corrcoef(loaded[:8_000], tone(16_000))[0, 1] > 0.99


def test_channels_are_averaged():
    left, right = tone(16_000), tone(16_000, frequency=300)
    both = (left + right) / 2
    stereo = np.stack([left, right])
    for form in (stereo, stereo.T, torch.from_numpy(stereo), stereo.tolist()):
        np.testing.assert_allclose(load_audio(form, 16_000), both, atol=1e-6)
    np.testing.assert_allclose(load_audio(Decoder(stereo, 16_000)), both, atol=1e-6)
    np.testing.assert_allclose(load_audio(left[None], 16_000), left)
    np.testing.assert_allclose(load_audio(left[:, None], 16_000), left)
    three = np.stack([left, right, left], axis=1)
    np.testing.assert_allclose(load_audio(encoded(three)), three.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize(
    ("audio", "rate", "error", "message"),
    [
        ("no/such/file.wav", None, FileNotFoundError, "no audio file 'no/such/file.wav'"),
        (".", None, ValueError, "is a folder"),
        ("https://example.org/a.wav", None, ValueError, "download the file first"),
        (b"", None, ValueError, "empty"),
        (b"This is a letter, not a recording. " * 40, None, ValueError, "not readable as wav, flac, ogg or mp3"),
        (encoded(np.zeros(0)), None, ValueError, "no samples"),
        (np.zeros(0, dtype=np.float32), 16_000, ValueError, "no samples"),
        (np.zeros((0, 2), dtype=np.float32), 16_000, ValueError, "no samples"),
        (np.array([0.1, np.nan, 0.2]), 16_000, ValueError, "NaN or infinite"),
        (np.array([0.1, np.inf, 0.2]), 16_000, ValueError, "NaN or infinite"),
        (encoded(np.array([0.1, np.nan]), subtype="FLOAT"), None, ValueError, "NaN or infinite"),
        (tone(16_000), None, ValueError, "sampling_rate="),
        ({"array": tone(16_000)}, None, ValueError, "sampling_rate="),
        (tone(16_000), 16, ValueError, "from 1000 to 1000000, got 16"),
        (tone(16_000), "16000", ValueError, "number of Hz"),
        (np.zeros((4, 16_000)), 16_000, ValueError, r"\(4, 16000\)"),
        (np.zeros((2, 2)), 16_000, ValueError, r"\(2, 2\)"),
        (np.zeros((1, 2, 16_000)), 16_000, ValueError, r"\(1, 2, 16000\)"),
        (np.float32(0.5), 16_000, TypeError, "got float32"),
        (np.array(0.5), 16_000, ValueError, r"got \(\)"),
        (np.array([1, 2, 3]), 16_000, TypeError, "int64"),
        (np.array(["a", "b"]), 16_000, TypeError, "PCM of type uint8, int16, int32"),
        (np.array([3000.0, -2000.0]), 16_000, ValueError, "far beyond"),
        ({"audio": "clip.wav", "text": "α"}, None, ValueError, r"keys \['audio', 'text'\]"),
        ({"array": None, "bytes": None, "path": None}, None, ValueError, "this one has the keys"),
        (None, None, TypeError, "got NoneType"),
        (7, 16_000, TypeError, "got int"),
    ],
)
def test_bad_audio_is_refused(audio, rate, error, message, processor, without_ffmpeg):
    with pytest.raises(error, match=message):
        load_audio(audio, rate)
    with pytest.raises(error, match=f"audio 1: .*{message}"):
        processor(audio=[{"array": tone(16_000), "sampling_rate": 16_000}, audio], sampling_rate=rate)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "WAV", "subtype": "PCM_16"},
        {"format": "AIFF", "subtype": "PCM_16"},
        {"format": "FLAC", "subtype": "PCM_16"},
        {"format": "OGG", "subtype": "VORBIS"},
        {"format": "OGG", "subtype": "OPUS"},
        {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    ],
    ids=lambda options: f"{options['format']} {options['subtype']}",
)
def test_truncated_files_are_refused(options, tmp_path, without_ffmpeg):
    noise = 0.1 * np.random.default_rng(0).standard_normal(48_000)
    whole = encoded(noise, **options)
    assert abs(len(load_audio(whole)) - 48_000) < 2_000
    for share in (0.5, 0.95):
        path = tmp_path / "cut.audio"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"cut.audio' is .*truncated"):
            load_audio(path)


def test_wav_of_a_pipe_is_not_taken_for_truncated():
    data = bytearray(encoded(tone(16_000)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    np.testing.assert_array_equal(load_audio(data), load_audio(encoded(tone(16_000))))


def test_ffmpeg_reads_what_libsndfile_cannot(monkeypatch, tmp_path):
    """Other containers, and FLAC from a pipe, whose header leaves its length open."""
    flac = bytearray(encoded(tone(16_000), format="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    samples = tone(16_000)
    (tmp_path / "pcm").write_bytes(samples.tobytes())
    program = tmp_path / "ffmpeg"
    program.write_text(
        "#!/bin/sh\n"
        'for argument; do case "$argument" in file:*) input="${argument#file:}";; esac; done\n'
        f'cat "{tmp_path}/pcm"\n'
        'case "$(head -c 4 "$input")" in fLaC|ftyp) ;; *) echo "moov atom not found" >&2; exit 1;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for data in (bytes(flac), b"ftypM4A and so on"):
        np.testing.assert_array_equal(load_audio(data), samples)
    with pytest.raises(ValueError, match="moov atom not found"):
        load_audio(b"no such luck")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="needs the ffmpeg program"):
        load_audio(b"ftypM4A and so on")


def test_features_are_whispers_own(processor, clips):
    inputs = processor(audio=clips, sampling_rate=16_000)
    expected = WhisperFeatureExtractor(feature_size=80, chunk_length=1)(
        clips, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    assert inputs.input_features.shape == (3, 80, 100)
    torch.testing.assert_close(inputs.input_features, expected)
    for index, clip in enumerate(clips):
        single = processor(audio=clip, sampling_rate=16_000)
        torch.testing.assert_close(single.input_features, expected[index : index + 1])
    mixed = processor(audio=({"bytes": encoded(clips[0], subtype="FLOAT")}, clips[1]), sampling_rate=16_000)
    torch.testing.assert_close(mixed.input_features, expected[:2])


def test_audio_beyond_the_window_is_refused(processor, clips):
    with pytest.raises(ValueError, match="audio 1 lasts 1.50 s, Whisper's window 1 s"):
        processor(audio=[clips[0], tone(16_000, 1.5)], sampling_rate=16_000)
    assert processor(audio=tone(16_000, 1.0), sampling_rate=16_000).input_features.shape == (1, 80, 100)


# ---- text


def test_default_prompt_is_the_start_token(processor, clips):
    inputs = processor(audio=clips, sampling_rate=16_000)
    assert set(inputs) == {"input_features", "input_ids", "attention_mask"}
    assert inputs.input_ids.tolist() == [[processor.tokenizer.bos_token_id]] * 3
    assert inputs.attention_mask.tolist() == [[1]] * 3
    assert "labels" not in processor(prompt="λέξεις")


def test_prompts_are_padded_on_the_left(processor):
    prompts = ["Η θάλασσα", "Πότε θα έρθεις στο χωριό;"]
    inputs = processor(prompt=prompts)
    for row, mask, prompt in zip(inputs.input_ids, inputs.attention_mask, prompts, strict=True):
        padding = int((mask == 0).sum())
        assert mask.tolist() == sorted(mask.tolist())
        assert set(row[:padding].tolist()) <= {processor.tokenizer.pad_token_id}
        assert row[padding].item() == processor.tokenizer.bos_token_id
        assert processor.decode(row) == prompt
    assert inputs.attention_mask.sum(-1).tolist()[0] < inputs.input_ids.shape[1]


def test_labels_cover_target_and_end_alone(processor, clips):
    texts = ["Η θάλασσα.", GREEK, ""]
    inputs = processor(audio=clips, text=texts, prompt="Πρωί: ", sampling_rate=16_000)
    tokenizer = processor.tokenizer
    for row, mask, labels, text in zip(
        *(inputs[name] for name in ("input_ids", "attention_mask", "labels")), texts, strict=True
    ):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        target = labels != -100
        assert torch.equal(labels[target], row[target])
        assert row[target][-1].item() == tokenizer.eos_token_id
        assert row[target].tolist()[:-1] == tokenizer(text, add_special_tokens=False).input_ids
        assert row[mask.bool() & ~target].tolist() == tokenizer("Πρωί: ").input_ids
        assert set(row[~mask.bool()].tolist()) <= {tokenizer.pad_token_id}
    assert processor(text=GREEK).labels.tolist()[0][0] == -100


def test_prompt_and_text_of_one_clip_are_strings(processor, clips):
    inputs = processor(audio=clips[0], text="Ναι.", prompt="Ή όχι;", sampling_rate=16_000, return_tensors="np")
    assert {name: len(value) for name, value in inputs.items()} == dict.fromkeys(inputs, 1)
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"audio": [np.zeros(9)] * 2, "text": "α"}, ValueError, "'audio': 2, 'text': 1"),
        ({"audio": [np.zeros(9)] * 2, "prompt": ["α"]}, ValueError, "'audio': 2, 'prompt': 1"),
        ({"audio": []}, ValueError, "'audio': 0"),
        ({"text": []}, ValueError, "'text': 0"),
        ({"text": ["α", None]}, TypeError, "text 1 must be a string, got NoneType"),
        ({"prompt": ["α", 3]}, TypeError, "prompt 1 must be a string, got int"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, error, message, processor):
    with pytest.raises(error, match=message):
        processor(**arguments, sampling_rate=16_000)


def bare_tokenizer(tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), **special)


def test_tokenizer_without_bos_or_pad(processor):
    def processor_of(**special) -> VoxKrikriProcessor:
        tokenizer = bare_tokenizer(processor.tokenizer, **special)
        return VoxKrikriProcessor(processor.feature_extractor, tokenizer, processor.speech_tokenizer)

    llama, qwen, base = (
        processor_of(bos_token="<s>", eos_token="</s>"),
        processor_of(eos_token="</s>", pad_token="<pad>"),
        processor_of(eos_token="</s>"),
    )
    start, end, pad = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<pad>"))
    for made, first, filler in ((llama, start, end), (qwen, pad, pad), (base, end, end)):
        inputs = made(text=["α", GREEK])
        assert inputs.input_ids[0, 0].item() == first == made.start_token_id
        count = int(inputs.attention_mask[0].sum())
        assert inputs.input_ids[0, count:].tolist() == [filler] * (inputs.input_ids.shape[1] - count)
        assert inputs.labels[0].tolist().count(end) == 1  # padding with EOS is no target
    for made, message in (
        (processor_of(), "set its bos_token"),
        (processor_of(bos_token="<s>"), "set tokenizer.eos_token"),
    ):
        with pytest.raises(ValueError, match=message):
            made(text="α")


def test_transcription_request(processor, clips):
    inputs = processor.apply_transcription_request(clips[:2], language="el", prompt="Λόγια:", sampling_rate=16_000)
    expected = processor(audio=clips[:2], prompt="Λόγια:", sampling_rate=16_000)
    assert inputs["language"] == "el"
    assert {"language", *expected} == set(inputs)
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name
    assert "language" not in processor.apply_transcription_request(clips[0], sampling_rate=16_000)


def test_chat_renders_text_and_turns_audio_into_features(processor, clips):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    chatting = VoxKrikriProcessor(processor.feature_extractor, tokenizer, processor.speech_tokenizer)

    def turns(words: str, *parts) -> list[dict]:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]

    clip = {"type": "audio", "array": clips[0], "sampling_rate": 16_000}
    other = {"type": "audio", "audio": clips[1]}
    first, second = turns("Τι λέει;", clip), [{"role": "system", "content": "Άκου."}, *turns("Λέγε", other)]
    assert chatting.apply_chat_template(first, tokenize=False) == "[user]Τι λέει;[γράψε]"
    assert chatting.apply_chat_template(first, tokenize=False, add_generation_prompt=False) == "[user]Τι λέει;"
    inputs = chatting.apply_chat_template([first, second], sampling_rate=16_000)
    assert inputs.attention_mask[0, 0] == 0 and inputs.attention_mask[:, -1].all()
    assert chatting.batch_decode(inputs.input_ids) == ["[user]Τι λέει;[γράψε]", "[system]Άκου.[user]Λέγε[γράψε]"]
    expected = processor(audio=clips[:2], sampling_rate=16_000).input_features
    assert torch.equal(inputs.input_features, expected)
    assert "input_features" not in chatting.apply_chat_template(turns("Γεια"))
    for conversation, message in (
        (turns("Τι;", clip, clip), "conversation 0 has 2 clips"),
        ([first, turns("Τι;")], "1 of 2 conversations"),
        (turns("Τι;", {"type": "image"}), "'image'"),
        (turns("Τι;", {"type": "audio"}), 'needs samples under "array"'),
    ):
        with pytest.raises(ValueError, match=message):
            chatting.apply_chat_template(conversation)


# ---- ids back to text, and round trips


def test_decoding_gives_the_text_back(processor):
    for decode, tokenizer in (
        (processor.decode, processor.tokenizer),
        (processor.decode_hypothesis, processor.speech_tokenizer),
    ):
        ids = tokenizer(f"  {GREEK} ").input_ids
        assert tokenizer.decode(ids) != GREEK
        for form in (ids, torch.tensor(ids), np.array(ids)):
            assert decode(form) == GREEK
        assert decode(torch.zeros(0, dtype=torch.long)) == ""
    ids = processor(prompt=["α β", GREEK]).input_ids
    assert processor.batch_decode(ids) == ["α β", GREEK]
    assert processor.decode(ids[1], skip_special_tokens=False) == f"<s> {GREEK}"


def test_hypothesis_token_counts_are_those_of_the_target(processor):
    texts = ["", "Ναι", GREEK]
    counts = processor.hypothesis_token_counts(texts)
    assert counts[0] == 1
    assert counts == (processor(text=texts).labels != -100).sum(-1).tolist()


def test_saved_processor_is_the_same(processor, clips, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "speech_tokenizer" / "tokenizer.json").is_file()
    loaded = VoxKrikriProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer is not loaded.speech_tokenizer
    assert type(loaded.speech_tokenizer) is type(processor.speech_tokenizer)
    arguments = {"audio": clips, "text": ["α", GREEK, ""], "prompt": "Ω", "sampling_rate": 16_000}
    for name, value in processor(**arguments).items():
        assert torch.equal(loaded(**arguments)[name], value), name
    ids = processor.speech_tokenizer(GREEK).input_ids
    assert loaded.decode_hypothesis(ids) == processor.decode_hypothesis(ids) == GREEK
    assert loaded.decode(loaded(prompt=GREEK).input_ids[0]) == GREEK


def test_parts_that_do_not_fit_are_refused(processor):
    extractor, tokenizer, speech_tokenizer = (
        processor.feature_extractor,
        processor.tokenizer,
        processor.speech_tokenizer,
    )
    with pytest.raises(ValueError, match="two objects"):
        VoxKrikriProcessor(extractor, tokenizer, tokenizer)
    with pytest.raises(ValueError, match="got 8000"):
        VoxKrikriProcessor(WhisperFeatureExtractor(feature_size=20, sampling_rate=8_000), tokenizer, speech_tokenizer)


def test_loading_asks_nothing(tiny, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))
    assert VoxKrikriProcessor.from_pretrained(tiny.folder).decode([5, 6]) == tiny.processor.decode([5, 6])
