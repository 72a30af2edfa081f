import json

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config, WhisperConfig

from voxkrikri import VoxKrikriConfig


SPEECH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "num_mel_bins": 128, "vocab_size": 500}
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 400, "eos_token_id": [7, 8]}


def build(**changes) -> VoxKrikriConfig:
    return VoxKrikriConfig(**{"speech_config": SPEECH, "text_config": {"model_type": "llama"} | TEXT} | changes)


def test_every_argument_survives_json_and_a_folder(tmp_path):
    config = build(
        speech_generation_config={"lang_to_id": {"<|el|>": 3}, "alignment_heads": [[1, 0]], "is_multilingual": True},
        text_config=Qwen2Config(**TEXT, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        injection_layers=[1, 3],
        fusion_heads=2,
        fusion_norm=False,
        fusion_mode="causal",
        alignment="text",
        alignment_lookahead=4,
        alignment_prior=True,
        copy_hypothesis=True,
        copy_bias=1.5,
        states_per_token=1.25,
        lora={"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        trained_text_modules=["lm_head"],
        light=True,
        speech_model_id="someone/whisper",
        speech_model_revision="abc",
        text_model_id="someone/llm",
        text_model_revision="def",
    )
    config.save_pretrained(tmp_path)
    for again in (
        VoxKrikriConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        VoxKrikriConfig.from_pretrained(tmp_path),
    ):
        ignored = {"transformers_version", "_name_or_path"}
        expected = {name: value for name, value in config.to_dict().items() if name not in ignored}
        assert {name: value for name, value in again.to_dict().items() if name not in ignored} == expected
        assert isinstance(again.speech_config, WhisperConfig)
        assert isinstance(again.text_config, Qwen2Config)
        assert again.text_config.rope_parameters["factor"] == 2.0
        assert again.speech_config.num_mel_bins == 128
        assert again.speech_generation_config["lang_to_id"] == {"<|el|>": 3}
        assert (again.injection_layers, again.fusion_heads, again.states_per_token) == ([1, 3], 2, 1.25)
        assert again.eos_token_id == [7, 8]


def test_a_configuration_and_its_dict_are_one():
    written, given = build(), build(speech_config=WhisperConfig(**SPEECH), text_config=LlamaConfig(**TEXT))
    assert written.to_dict() == given.to_dict()


@pytest.mark.parametrize(("layers", "default"), [(1, 1), (2, 1), (3, 2), (12, 8), (32, 21)])
def test_audio_enters_two_thirds_up_by_default(layers, default):
    assert build(text_config={"model_type": "llama", **TEXT, "num_hidden_layers": layers}).injection_layers == [
        default
    ]


def test_fusion_has_the_llms_heads_by_default():
    assert build().fusion_heads == 4
    assert build(fusion_heads=1).fusion_heads == 1


def test_defaults_need_no_argument():
    config = VoxKrikriConfig()
    assert (config.speech_config.model_type, config.text_config.model_type) == ("whisper", "llama")
    assert config.injection_layers == [21]


def test_code_is_named_for_every_auto_class():
    config = build()
    assert set(config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSpeechSeq2Seq", "AutoProcessor"}
    assert config.custom_pipelines["automatic-speech-recognition"]["impl"].startswith("pipeline_voxkrikri.")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"speech_config": GPT2Config()}, ValueError, "must be a Whisper .*'gpt2'", id="speech"),
        pytest.param({"speech_config": {"model_type": "moonshine"}}, ValueError, "'moonshine'", id="speech-dict"),
        pytest.param({"speech_config": "whisper"}, TypeError, "speech_config .* got str", id="speech-type"),
        pytest.param({"text_config": 3}, TypeError, "text_config .* got int", id="text-type"),
        pytest.param(
            {"text_config": {"model_type": "mamba"}}, ValueError, "'mamba' has no num_att", id="no-attention"
        ),
        pytest.param({"text_config": {"model_type": "gemma3"}}, ValueError, "'gemma3' has no num_hid", id="not-text"),
        pytest.param({"injection_layers": [0]}, ValueError, r"layers 1 to 3 .* got \[0\]", id="layer-0"),
        pytest.param({"injection_layers": [2, 4]}, ValueError, r"layers 1 to 3 .* got \[2, 4\]", id="layer-above"),
        pytest.param({"injection_layers": []}, ValueError, r"got \[\]", id="no-layer"),
        pytest.param({"injection_layers": [2, 2]}, ValueError, r"differ .* got \[2, 2\]", id="layer-twice"),
        pytest.param({"fusion_heads": 5}, ValueError, "divide the LLM's hidden size 24, got 5", id="heads"),
        pytest.param({"fusion_heads": 0}, ValueError, "divide the LLM's hidden size 24, got 0", id="no-heads"),
        pytest.param({"fusion_heads": -4}, ValueError, "divide the LLM's hidden size 24, got -4", id="minus-heads"),
        pytest.param({"fusion_mode": "half"}, ValueError, "'full', 'causal'.*'half'", id="mode"),
        pytest.param({"alignment": "words"}, ValueError, "'ratio', 'text'.*'words'", id="alignment"),
        pytest.param({"alignment_lookahead": -1}, ValueError, "from 0, got -1", id="lookahead"),
        pytest.param({"copy_hypothesis": True}, ValueError, "needs alignment=\"text\".*'ratio'", id="copy"),
        pytest.param({"copy_bias": 1.0}, ValueError, "1.0. needs copy_hypothesis", id="copy-bias"),
        pytest.param({"states_per_token": 0.0}, ValueError, "positive, got 0.0", id="ratio"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        build(**changes)
