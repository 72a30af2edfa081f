import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from voxkrikri import VoxKrikriPipeline
from voxkrikri.transcription_voxkrikri import transcribe


TASK = "automatic-speech-recognition"


@pytest.fixture(scope="module")
def asr(tiny) -> VoxKrikriPipeline:
    return VoxKrikriPipeline(tiny.model, processor=tiny.processor)


@pytest.fixture(scope="module")
def files(clips, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{index}.wav" for index in range(len(clips))]
    for path, clip in zip(paths, clips, strict=True):
        soundfile.write(path, clip, 16_000, subtype="FLOAT")
    return paths


@pytest.fixture(scope="module")
def expected(tiny, clips) -> list[dict]:
    """The texts by hand: processor, Whisper, T, greedy LLM, decode."""
    outputs = []
    for clip in clips:
        inputs = tiny.processor.apply_transcription_request(clip, sampling_rate=16_000)
        hypothesis = tiny.processor.decode_hypothesis(tiny.model.listen(inputs["input_features"]).hypothesis_ids[0])
        counts = torch.tensor(tiny.processor.hypothesis_token_counts([hypothesis]))
        ids = tiny.model.generate(**inputs, hypothesis_token_counts=counts, do_sample=False, num_beams=1)
        outputs.append({"text": tiny.processor.decode(ids[0]), "hypothesis": hypothesis})
    assert len({output["text"] for output in outputs}) == len(clips)
    return outputs


def texts(outputs) -> list[dict]:
    return [{"text": output["text"]} for output in outputs]


def test_every_form_of_one_clip(asr, files, clips, expected):
    file = io.BytesIO()
    soundfile.write(file, clips[0], 16_000, format="WAV", subtype="FLOAT")
    forms = (
        str(files[0]),
        files[0],
        file.getvalue(),
        {"array": clips[0], "sampling_rate": 16_000},
        {"raw": clips[0], "sampling_rate": 16_000},
        {"bytes": None, "path": str(files[0])},
    )
    for form in forms:
        assert asr(form) == {"text": expected[0]["text"]}
    for form in (clips[0], torch.from_numpy(clips[0]), clips[0].tolist()):
        assert asr(form, sampling_rate=16_000) == {"text": expected[0]["text"]}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_many_clips(asr, files, expected, batch_size):
    rows = [{"audio": str(path)} for path in files]
    column = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))["audio"]
    for inputs in (files, tuple(map(str, files)), column):
        outputs = asr(inputs, batch_size=batch_size)
        assert isinstance(outputs, list)
        assert outputs == texts(expected)
    for inputs in ((path for path in files), iter(files), KeyDataset(rows, "audio")):
        outputs = asr(inputs, batch_size=batch_size)
        assert not isinstance(outputs, list)
        assert list(outputs) == texts(expected)
    assert asr([]) == []


def test_a_generator_is_read_as_results_are_asked_for(asr, tiny, files, expected):
    in_pairs = VoxKrikriPipeline(tiny.model, processor=tiny.processor, batch_size=2)
    files, expected = 6 * files, 6 * expected
    for made, options, ahead in ((asr, {}, 1), (asr, {"batch_size": 2}, 16), (in_pairs, {}, 16)):
        read = []
        outputs = made((read.append(path) or path for path in files), **options)
        assert read == []
        assert next(outputs) == {"text": expected[0]["text"]}
        assert read == files[:ahead]
        assert list(outputs) == texts(expected[1:])


def test_what_is_returned(asr, tiny, clips, expected):
    audio = np.concatenate([clips[2], clips[1]])
    (result,) = transcribe(tiny.model, tiny.processor, [audio], sampling_rate=16_000)
    assert len(result["segments"]) == 2
    output = asr(audio, sampling_rate=16_000, return_hypothesis=True, return_timestamps=True)
    assert output == {
        "text": result["text"],
        "hypothesis": result["hypothesis"],
        "chunks": [{"text": s["text"], "timestamp": (s["start"], s["end"])} for s in result["segments"]],
    }
    assert asr(audio, sampling_rate=16_000, return_segments=True) == result
    set_up = VoxKrikriPipeline(tiny.model, processor=tiny.processor, return_hypothesis=True, sampling_rate=16_000)
    assert set_up(clips[0]) == expected[0]
    assert set_up(clips[0], return_hypothesis=False) == {"text": expected[0]["text"]}


def test_silence_is_empty_text(asr):
    silence = {"array": np.zeros(50_000), "sampling_rate": 16_000}
    assert asr(silence, return_hypothesis=True, return_timestamps=True) == {"text": "", "hypothesis": "", "chunks": []}


def test_generation_options(asr, tiny, clips, expected):
    def generate(**options) -> str:
        inputs = tiny.processor.apply_transcription_request(
            clips[0], prompt=options.pop("prompt", None), sampling_rate=16_000
        )
        counts = torch.tensor(tiny.processor.hypothesis_token_counts([expected[0]["hypothesis"]]))
        return tiny.processor.decode(tiny.model.generate(**inputs, hypothesis_token_counts=counts, **options)[0])

    audio = {"array": clips[0], "sampling_rate": 16_000}
    seen = {expected[0]["text"]}
    for options in ({"num_beams": 5}, {"max_new_tokens": 2}, {"fusion_mode": "causal"}):
        text = asr(audio, generate_kwargs=options)["text"]
        assert text == generate(**options) == asr(audio, **options)["text"]
        seen.add(text)
    seen.add(asr(audio, prompt="Πρωί.")["text"])
    assert asr(audio, prompt="Πρωί.")["text"] == generate(prompt="Πρωί.")
    assert len(seen) == 5  # so each of them has had its effect; five beams among them are no default
    assert asr(audio, language="greek")["text"] == expected[0]["text"]
    with pytest.raises(ValueError, match="language 'en' is unknown"):
        asr(audio, language="en")
    set_up = VoxKrikriPipeline(tiny.model, processor=tiny.processor, num_beams=5, batch_size=2)
    assert set_up(audio)["text"] == generate(num_beams=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_timestamps": "word"}, "'word' is not known yet"),
        ({"chunk_length_s": 30}, "leave out chunk_length_s"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(asr, files, options, message):
    with pytest.raises(ValueError, match=message):
        asr(files[0], **options)


def test_bad_clips_are_refused(asr, files, clips):
    with pytest.raises(ValueError, match="^samples need their rate"):
        asr(clips[0])
    with pytest.raises(FileNotFoundError, match="^there is no audio file 'gone.wav'"):
        asr("gone.wav")
    with pytest.raises(TypeError, match="got NoneType"):
        asr(None)
    for inputs in ([files[0], b""], (clip for clip in (files[0], b""))):
        with pytest.raises(ValueError, match="audio 1: the file of 0 bytes is empty"):
            list(asr(inputs, batch_size=2))


def test_parts_in_place_of_the_processor_are_refused(tiny):
    with pytest.raises(ValueError, match="takes its processor whole, got none"):
        VoxKrikriPipeline(tiny.model)
    with pytest.raises(ValueError, match="takes its processor whole, got tokenizer: pass only processor="):
        VoxKrikriPipeline(tiny.model, processor=tiny.processor, tokenizer=tiny.processor.tokenizer)


def test_loaded_objects_by_name_of_the_class(tiny, files, expected):
    asr = pipeline(TASK, model=tiny.model, processor=tiny.processor, pipeline_class=VoxKrikriPipeline)
    assert asr(files[0]) == {"text": expected[0]["text"]}


def test_stock_pipeline_of_loaded_objects_names_the_right_call(tiny, clips):
    stock = pipeline(
        TASK,
        model=tiny.model,
        tokenizer=tiny.processor.tokenizer,
        feature_extractor=tiny.processor.feature_extractor,
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        stock(clips[0])


PROGRAM = """
import json, sys
from transformers import AutoProcessor, pipeline
folder, processor_folder, saved, *paths = sys.argv[1:]
asr = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
outputs = asr(paths, batch_size=2, return_hypothesis=True)
asr.save_pretrained(saved)
again = pipeline("automatic-speech-recognition", model=saved, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(processor_folder, trust_remote_code=True)
assert "voxkrikri" not in sys.modules
print(json.dumps([outputs, again(paths, return_hypothesis=True), processor.hypothesis_token_counts(["", "Ναι"])]))
"""


def test_without_the_package(tiny, files, expected, tmp_path):
    """As from the Hub: the folder's own code, in a process that never imports `voxkrikri`; saved and loaded again."""
    tiny.processor.save_pretrained(tmp_path / "processor")
    folders = [str(tiny.folder), str(tmp_path / "processor"), str(tmp_path / "saved")]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders, *map(str, files)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    outputs, again, counts = json.loads(result.stdout)
    assert outputs == again == expected
    assert counts == tiny.processor.hypothesis_token_counts(["", "Ναι"])
