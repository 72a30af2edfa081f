"""The mini's recipe in small: speech that says when its words are, nested vocabularies, both models in a few steps."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import SENTENCES
from transformers import AutoTokenizer, LlamaForCausalLM, WhisperForConditionalGeneration

from recipes.mini import mix, release, speech_model, text_model
from recipes.mini.speak import NOISES, RATES, ROOMS, TEST_NOISE, TEST_ROOM, VOICES, make_noise, room_response
from recipes.mini.speak import main as speak
from recipes.second_language import sentences
from voxkrikri import VoxKrikriForConditionalGeneration, VoxKrikriProcessor


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def spoken(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken")
    speak(["--text", str(texts), "--group", "test", "--renderings", "2", "--out", str(folder), "--processes", "1"])
    return folder


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").open(encoding="utf-8")]


def test_the_sentences_of_the_second_language_are_disjoint_and_their_domains_apart(tmp_path):
    sentences.main(["--out", str(tmp_path)])
    files = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in tmp_path.iterdir()}
    lines = [line for name in files for line in files[name]]
    assert len(lines) == len(set(lines)) == sum((sentences.EVERYDAY | sentences.TRAINS).values())
    assert all(line == " ".join(line.split()) and line[0].isupper() and line[-1] in ".?" for line in lines)
    words = {name: {word.strip(".,?") for line in files[name] for word in line.split()} for name in files}
    assert words["test"] <= words["train"] and words["trains_test"] <= words["trains"]
    assert {"treno", "binario", "ritardo"} <= words["trains"] - words["train"] - words["whisper"]


def test_mixed_sentences_are_new_and_made_of_pairs_of_the_texts(tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "mixed.txt"
    lines = [
        "το παιδί και η μητέρα",
        "η μητέρα και το σκυλί κοιμούνται",
        "ένα σκυλί και ένα παιδί και η γάτα",
        "σελ. 12",
    ]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["--text", str(texts), "--count", "20", "--max-words", "9", "--out", str(out)]
    mix.main(command)
    mixed = out.read_text(encoding="utf-8").splitlines()
    assert len(mixed) == len(set(mixed)) == 20 and not set(mixed) & set(lines)
    assert all(2 < len(line.split()) <= 9 for line in mixed)

    def pairs(line: str) -> set[tuple[str, str]]:
        words = ["", *line.split(), ""]
        return set(zip(words, words[1:], strict=False))

    assert set().union(*map(pairs, mixed)) <= set().union(*map(pairs, lines[:3]))
    mix.main(command)
    assert out.read_text(encoding="utf-8").splitlines() == mixed


def test_a_text_that_gives_no_more_new_sentences_is_refused(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("το παιδί κοιμάται\nη γάτα παίζει εδώ\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        mix.main(["--text", str(texts), "--count", "5", "--out", str(tmp_path / "mixed.txt")])
    assert not (tmp_path / "mixed.txt").exists()


def test_groups_share_no_voice_and_no_rate():
    for table in (VOICES, RATES):
        drawn = [value for values in table.values() for value in values]
        assert len(drawn) == len(set(drawn))
    assert TEST_NOISE not in NOISES and TEST_ROOM not in ROOMS


@pytest.mark.parametrize("kind", [kind for kind in (*NOISES, TEST_NOISE) if kind != "babble"])
def test_every_noise_sounds(kind):
    noise = make_noise(kind, 4_000, np.random.default_rng(0), list(SENTENCES), "el", "test")
    assert noise.shape == (4_000,) and np.isfinite(noise).all() and noise.std() > 0


@pytest.mark.parametrize("rt60", [*ROOMS, TEST_ROOM])
def test_a_room_dies_away_in_its_time(rt60):
    response = room_response(rt60, np.random.default_rng(0))
    energy = response[1:] ** 2  # without the direct sound
    remaining = np.cumsum(energy[::-1])[::-1] / energy.sum()  # Schroeder's integral
    early, late = int(0.1 * len(energy)), int(0.5 * len(energy))
    slope = 10 * np.log10(remaining[late] / remaining[early]) / (0.4 * rt60)  # dB a second
    assert response[0] == 1
    assert -60 / slope == pytest.approx(rt60, rel=0.25)


@pytest.mark.system
def test_clips_hold_all_sentences_in_voices_of_their_group(spoken):
    clips = entries(spoken)
    said = " ".join(clip["text"] for clip in clips)
    assert all(said.count(sentence) == 2 for sentence in SENTENCES)
    for clip in clips:
        audio, rate = soundfile.read(spoken / clip["audio"])
        assert rate == 16_000 and len(audio) / rate == pytest.approx(clip["duration"], abs=0.01)
        assert np.abs(audio).max() <= 1
        if clip["text"]:
            assert clip["voice"] in VOICES["test"] and clip["rate"] in RATES["test"]


@pytest.mark.system
def test_words_have_their_times(spoken):
    for clip in entries(spoken):
        words = clip["words"]
        assert [word["word"] for word in words] == clip["text"].split()
        times = [time for word in words for time in (word["start"], word["end"])]
        assert times == sorted(times)
        assert not times or times[0] > 0 and times[-1] <= clip["duration"]


@pytest.mark.system
def test_speaking_again_and_going_on_after_a_cut_give_the_same_clips(texts, spoken, tmp_path):
    again = ["--text", str(texts), "--group", "test", "--renderings", "2", "--out", str(tmp_path), "--processes", "1"]
    speak(again)
    assert entries(tmp_path) == entries(spoken)
    (tmp_path / "0000.jsonl").unlink()  # as if cut off within this part
    shutil.rmtree(tmp_path / "0000")
    speak(again)
    assert entries(tmp_path) == entries(spoken)
    clip = entries(spoken)[0]["audio"]
    assert (tmp_path / clip).read_bytes() == (spoken / clip).read_bytes()


def test_every_llm_token_is_a_run_of_whole_whisper_tokens(tokenizers):
    for sentence in SENTENCES:
        pieces = [
            tokenizers.speech.convert_ids_to_tokens(tokenizers.speech(sentence, add_special_tokens=False).input_ids)
        ]
        tokens = tokenizers.text.convert_ids_to_tokens(tokenizers.text(sentence, add_special_tokens=False).input_ids)
        ends = {sum(map(len, pieces[0][: index + 1])) for index in range(len(pieces[0]))}
        assert {sum(map(len, tokens[: index + 1])) for index in range(len(tokens))} <= ends
        assert len(tokens) < len(pieces[0])
        assert "".join(pieces[0]) == "".join(tokens)


@pytest.mark.system
def test_both_models_train_and_load(texts, spoken, tokenizers, tmp_path, monkeypatch):
    for name, value in {"HIDDEN": 16, "ENCODER_LAYERS": 1, "DECODER_LAYERS": 1, "HEADS": 2}.items():
        monkeypatch.setattr(speech_model, name, value)
    for name, value in {"HIDDEN": 16, "LAYERS": 1, "HEADS": 2, "FEED_FORWARD": 32}.items():
        monkeypatch.setattr(text_model, name, value)
    tokenizers.speech.save_pretrained(tmp_path / "vocabulary" / "speech")
    tokenizers.text.save_pretrained(tmp_path / "vocabulary" / "text")
    common = ["--train", str(spoken), "--validation", str(spoken)]
    few = ["--steps", "2", "--batch-size", "2", "--save-steps", "2"]
    tokenizer = ["--tokenizer", str(tmp_path / "vocabulary" / "speech")]
    speech_model.main([*common, *few, *tokenizer, "--out", str(tmp_path / "speech")])
    speech_model.main([*common, *few, "--init", str(tmp_path / "speech"), "--out", str(tmp_path / "further")])
    whisper = WhisperForConditionalGeneration.from_pretrained(tmp_path / "further")
    assert whisper.generation_config.alignment_heads and not whisper.config.apply_spec_augment
    text = ["--train", str(texts), "--validation", str(texts), "--tokenizer", str(tmp_path / "vocabulary" / "text")]
    for epochs in ("1", "0"):  # none: the LLM of random weights that the table compares with
        text_model.main([*text, "--epochs", epochs, "--out", str(tmp_path / f"text{epochs}")])
        llm = LlamaForCausalLM.from_pretrained(tmp_path / f"text{epochs}")
        assert llm.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / f"text{epochs}"))


def test_release_stores_bfloat16_and_loads_float32(tiny, tmp_path):
    release.main([str(tiny.folder), "--root", str(tmp_path / "root")])
    assert {path.name for path in (tmp_path / "root").glob("model-*")} == {
        f"model-{part}.safetensors" for part in ("speech", "text", "fusion")
    }
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path / "root")
    assert again.dtype == torch.float32 and again.config.speech_model_id is None
    for name, value in again.state_dict().items():
        assert torch.equal(value, tiny.model.state_dict()[name].to(torch.bfloat16).to(value.dtype)), name
    assert VoxKrikriProcessor.from_pretrained(tmp_path / "root").decode([5, 6]) == tiny.processor.decode([5, 6])
