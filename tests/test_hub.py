"""Loading by transformers' auto classes alone, in a process that never imports this project nor what is optional."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from voxkrikri import VoxKrikriPipeline


ROOT = Path(__file__).parents[1]
ALLOWED = {"torch", "transformers", "numpy", "soundfile", "soxr", "safetensors", "huggingface_hub"}
SCRIPT = """
import json
import sys

OPTIONAL = ("peft", "datasets", "evaluate", "jiwer", "gradio", "scipy", "pandas")
sys.modules |= dict.fromkeys(OPTIONAL)  # importing one of them is an error

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

folder, work = sys.argv[1:]
clip, task = f"{work}/clip.wav", "automatic-speech-recognition"


def hear(model, processor):
    inputs = processor(audio=[clip, f"{work}/short.wav"])
    text = {"input_ids": torch.tensor([[1, 2, 3, 4]] * 2), "text_positions": torch.tensor([[-1, 0, 1, 2]] * 2)}
    with torch.no_grad():
        logits = model(input_features=inputs.input_features, **text).logits
    return logits, [processor.decode(ids) for ids in model.generate(**inputs)]


config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
results = {"config": config.to_dict()["fusion_heads"], "classes": []}
tensors = {}
for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    tensors[auto_class.__name__], results[auto_class.__name__] = hear(model, processor)
    results["classes"].append(type(model).__module__.split(".")[0])
asr = pipeline(task, model=folder, trust_remote_code=True)
results["pipeline"] = asr([clip, f"{work}/short.wav"], return_hypothesis=True)

model.save_pretrained(f"{work}/third")
processor.save_pretrained(f"{work}/third")
asr.save_pretrained(f"{work}/fourth")
for name in ("third", "fourth"):
    again = AutoModel.from_pretrained(f"{work}/{name}", trust_remote_code=True)
    tensors[name], _ = hear(again, AutoProcessor.from_pretrained(f"{work}/{name}", trust_remote_code=True))
    results[name] = pipeline(task, model=f"{work}/{name}", trust_remote_code=True)(clip)["text"]
results["imported"] = sorted(name for name in ("voxkrikri", *OPTIONAL) if sys.modules.get(name) is not None)
save_file(tensors, f"{work}/logits.safetensors")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def elsewhere(tiny, clips, tmp_path_factory) -> SimpleNamespace:
    """What the other process says: `results`, `logits`; and `work`, its folder with the two clips."""
    work = tmp_path_factory.mktemp("elsewhere")
    soundfile.write(work / "clip.wav", clips[2], 16_000, subtype="FLOAT")
    soundfile.write(work / "short.wav", clips[0], 16_000, subtype="FLOAT")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "HF_HOME": str(work / "home")}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny.folder), str(work)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    return SimpleNamespace(results=results, logits=load_file(work / "logits.safetensors"), work=work)


@pytest.fixture(scope="module")
def here(tiny, clips) -> SimpleNamespace:
    inputs = tiny.processor(audio=[clips[2], clips[0]], sampling_rate=16_000)
    text = {"input_ids": torch.tensor([[1, 2, 3, 4]] * 2), "text_positions": torch.tensor([[-1, 0, 1, 2]] * 2)}
    with torch.no_grad():
        logits = tiny.model(input_features=inputs.input_features, **text).logits
    texts = [tiny.processor.decode(ids) for ids in tiny.model.generate(**inputs)]
    return SimpleNamespace(logits=logits, texts=texts)


def test_nothing_of_ours_nor_optional_was_imported(elsewhere):
    assert elsewhere.results["imported"] == []
    assert elsewhere.results["classes"] == ["transformers_modules", "transformers_modules"]


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForSpeechSeq2Seq"])
def test_loaded_from_the_folder_is_imported(elsewhere, here, auto_class):
    torch.testing.assert_close(elsewhere.logits[auto_class], here.logits)
    assert elsewhere.results[auto_class] == here.texts
    assert len(set(here.texts)) == 2


def test_configuration_is_loaded(elsewhere, tiny):
    assert elsewhere.results["config"] == tiny.model.config.fusion_heads


def test_the_pipeline_says_what_the_imported_one_says(elsewhere, tiny):
    files = [str(elsewhere.work / name) for name in ("clip.wav", "short.wav")]
    asr = VoxKrikriPipeline(tiny.model, processor=tiny.processor)
    assert elsewhere.results["pipeline"] == asr(files, return_hypothesis=True)
    assert elsewhere.results["pipeline"][0]["text"]


@pytest.mark.parametrize("folder", ["third", "fourth"])
def test_what_was_loaded_can_be_saved_and_loaded_again(elsewhere, here, tiny, folder):
    torch.testing.assert_close(elsewhere.logits[folder], here.logits)
    assert elsewhere.results[folder] == elsewhere.results["pipeline"][0]["text"]
    files = [{path.name for path in place.iterdir()} for place in (tiny.folder, elsewhere.work / folder)]
    assert files[0] == files[1]
    assert "adapter_config.json" not in files[1]
    for path in tiny.folder.glob("*_voxkrikri.py"):
        assert (elsewhere.work / folder / path.name).read_bytes() == path.read_bytes()


HUB_FILES = sorted(path.name for path in ROOT.glob("*_voxkrikri.py"))


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_hub_file_needs_nothing_more(name):
    standard = sys.stdlib_module_names
    assert set(get_imports(ROOT / name)) - standard <= ALLOWED
    assert {f"{module}.py" for module in get_relative_imports(ROOT / name)} <= set(HUB_FILES)
    imports = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("from .")]
    assert all(line.split()[1].count(".") == 1 and line.split()[1].endswith("_voxkrikri") for line in imports)


def test_every_hub_file_is_saved(tiny):
    assert {path.name for path in tiny.folder.glob("*_voxkrikri.py")} == set(HUB_FILES)
    config = json.loads((tiny.folder / "config.json").read_text())
    for reference in [
        *config["auto_map"].values(),
        config["custom_pipelines"]["automatic-speech-recognition"]["impl"],
    ]:
        module, name = reference.split(".")
        assert f"class {name}(" in (tiny.folder / f"{module}.py").read_text(encoding="utf-8")
