"""The mini at the repository's root: it is whole, small enough to live in git, and it transcribes."""

import json

import numpy as np
import pytest
import soundfile
import soxr
from transformers import pipeline

from metrics.greek_wer.greek_wer import word_error_rate
from recipes.mini.release import LIMITS, ROOT
from tools import tune


EXAMPLES = sorted((ROOT / "examples").glob("*.flac"))
REFERENCES = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in EXAMPLES]


@pytest.fixture(scope="module")
def asr():
    return pipeline("automatic-speech-recognition", model=str(ROOT), trust_remote_code=True)


def test_its_weights_are_whole_and_small():
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32" and not config["light"] and config["speech_model_id"] is None
    for part, limit in LIMITS.items():
        assert (ROOT / f"model-{part}.safetensors").stat().st_size < limit * 1e6


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_it_transcribes_the_examples(asr, mode):
    results = asr([str(path) for path in EXAMPLES], return_hypothesis=True, generate_kwargs={"fusion_mode": mode})
    assert word_error_rate(REFERENCES, [result["text"] for result in results]) < 0.5
    assert word_error_rate(REFERENCES, [result["hypothesis"] for result in results]) < 0.6


def test_a_batch_gives_what_its_clips_give(asr):
    paths = [str(path) for path in EXAMPLES[:4]]
    assert asr(paths, batch_size=4) == [asr(path) for path in paths]


def test_its_copy_bias_can_be_tuned_and_is_kept_where_it_is_best(tmp_path, capsys):
    for path in ROOT.iterdir():
        if path.suffix in (".safetensors", ".json") or path.name == "speech_tokenizer":
            (tmp_path / path.name).symlink_to(path)
    config = (ROOT / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    lines = [json.dumps({"audio": str(path), "text": text}) for path, text in zip(EXAMPLES, REFERENCES, strict=True)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tune.main([str(tmp_path / "manifest.jsonl"), "--model", str(tmp_path), "--biases", "-40", "50"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("bias 50:") and printed[2].endswith("kept")
    assert printed[0].split()[1] == printed[2].split()[2]  # all copied: Whisper's own rate
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == json.loads(config) | {
        "copy_bias": 50.0
    }


def test_stereo_at_another_rate_is_the_same_speech(asr, tmp_path):
    samples, rate = soundfile.read(EXAMPLES[0], dtype="float32")
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([soxr.resample(samples, rate, 44_100)] * 2, axis=1), 44_100)
    assert word_error_rate([asr(str(EXAMPLES[0]))["text"]], [asr(str(path))["text"]]) < 0.3


def test_silence_has_no_text(asr):
    assert asr({"array": np.zeros(32_000, dtype=np.float32), "sampling_rate": 16_000})["text"] == ""
