"""What real Whispers and real LLMs do differently, met on tiny models of the same kinds."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import assemble, tiny_speech_model, tiny_text_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from voxkrikri import VoxKrikriForConditionalGeneration


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = 4  # rows that a sliding attention sees; the texts are longer
LLAMA, MISTRAL = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
GEMMA_2, GEMMA_3 = (Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)
QWEN_2, QWEN_3 = (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}


def check(model, features: torch.Tensor, folder) -> SimpleNamespace:
    """Batch = single and cache = no cache in both modes, a training step, saved = reloaded. Returns the reloaded."""
    prompts = torch.tensor([[3, 3, 3, 10, 11], [3, 12, 13, 14, 15], [16, 17, 18, 19, 20]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_features": features, "input_ids": prompts, "attention_mask": mask}
    transcripts = {}
    for mode in ("full", "causal"):
        ids = transcripts[mode] = model.generate(**inputs, fusion_mode=mode)
        assert torch.equal(model.generate(**inputs, fusion_mode=mode, use_cache=False), ids)
        for clip in range(3):
            alone = model.generate(
                features[clip : clip + 1], prompts[clip : clip + 1, 5 - mask[clip].sum() :], fusion_mode=mode
            )
            assert torch.equal(alone[0], ids[clip, : alone.shape[1]])
        assert not torch.equal(model.generate(**inputs | {"input_features": features.flip(0)}, fusion_mode=mode), ids)

    folder = folder / "saved"
    model.save_pretrained(folder)
    again = VoxKrikriForConditionalGeneration.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for mode, ids in transcripts.items():
        assert torch.equal(again.generate(**inputs, fusion_mode=mode), ids)

    trained = copy.deepcopy(model).train()
    labels = prompts.masked_fill(torch.arange(5) < 3, -100)
    batch = {"input_features": features, "input_ids": prompts, "attention_mask": mask, "labels": labels}
    optimizer = torch.optim.SGD([value for value in trained.parameters() if value.requires_grad], lr=1e-3)
    for mode in ("full", "causal"):
        loss = trained(**batch, fusion_mode=mode).loss
        loss.backward()
        assert all(value.grad.isfinite().all() for value in trained.parameters() if value.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        assert trained(**batch, fusion_mode=mode).loss < loss
    return again


# ---- LLMs


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(
            LLAMA, {"rope_parameters": LLAMA_3_ROPE, "pad_token_id": None, "eos_token_id": [7, 8]}, id="llama-3.1"
        ),
        pytest.param(LLAMA, {"num_key_value_heads": 1, "tie_word_embeddings": True}, id="grouped-queries-tied-head"),
        pytest.param(QWEN_2, {"bos_token_id": None}, id="qwen2"),
        pytest.param(QWEN_3, {"bos_token_id": None, "pad_token_id": None, "head_dim": 16}, id="qwen3"),
        pytest.param(GEMMA_2, GEMMA, id="gemma2"),
        pytest.param(GEMMA_3, GEMMA, id="gemma3"),
        pytest.param(MISTRAL, {"sliding_window": WINDOW}, id="sliding-mistral"),
        pytest.param((Phi3Config, Phi3ForCausalLM), {}, id="phi3"),
    ],
)
def test_llm(tokenizers, features, tmp_path, kind, changes):
    torch.manual_seed(0)
    text = tiny_text_model(tokenizers.text, *kind, **changes)
    logits = text(torch.tensor([[4, 5, 6, 7, 8, 9]])).logits
    model = assemble(tokenizers, text=text, lora=LORA, injection_layers=[1, 2])
    assert torch.equal(model(torch.tensor([[4, 5, 6, 7, 8, 9]])).logits, logits)
    again = check(model, features, tmp_path)
    assert again.generation_config.eos_token_id == text.config.eos_token_id
    assert again.config.text_config.to_dict().get("rope_parameters") == text.config.to_dict().get("rope_parameters")


def test_any_of_several_ends_is_an_end(tokenizers, features):
    model = assemble(tokenizers, text=tiny_text_model(tokenizers.text, eos_token_id=[7, 8], pad_token_id=None))
    assert model.end_token_ids == [7, 8]
    for end in (7, 8):
        raised = torch.zeros(model.config.text_config.vocab_size)
        raised[end] = 100.0
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, args, out, raised=raised: out + raised
        )
        assert model.generate(features).tolist() == [[end]] * 3
        assert model.generate(features, num_beams=2)[:, 0].tolist() == [end] * 3
        handle.remove()


def test_sliding_windows_slide(tokenizers, features):
    """The windows of the models above are short enough to matter."""
    model = assemble(tokenizers, text=tiny_text_model(tokenizers.text, *MISTRAL, sliding_window=WINDOW))
    ids = torch.arange(10, 22)[None]
    other = ids.clone()
    other[0, 0] = 5
    logits = [model(each).logits[0, -1] for each in (ids, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param((GPT2LMHeadModel, GPT2Config), {"n_embd": 32, "n_layer": 2, "n_head": 2}, id="gpt2"),
        pytest.param((BloomForCausalLM, BloomConfig), {"hidden_size": 32, "n_layer": 2, "n_head": 2}, id="bloom"),
        pytest.param((MambaForCausalLM, MambaConfig), {"hidden_size": 32, "num_hidden_layers": 2}, id="mamba"),
    ],
)
def test_other_stacks_are_refused_by_name(tokenizers, kind, sizes):
    model_class, config_class = kind
    text = model_class(config_class(vocab_size=len(tokenizers.text), **sizes))
    name = "'mamba'" if config_class is MambaConfig else f"{model_class.__name__} has no plain stack"
    with pytest.raises(ValueError, match=name):
        assemble(tokenizers, text=text)


# ---- Whispers


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_mel_bins": 128}, id="large-v3-mels"),
        pytest.param({"encoder_layers": 6, "decoder_layers": 4, "num_mel_bins": 128}, id="turbo"),
    ],
)
def test_whisper_shapes(tokenizers, tmp_path, changes):
    torch.manual_seed(0)
    speech = tiny_speech_model(tokenizers.speech, **changes)
    features = torch.randn(3, 128, 100)
    again = check(assemble(tokenizers, speech=speech, lora=LORA), features, tmp_path)
    assert len(again.speech_model.model.decoder.layers) == again.config.speech_config.decoder_layers
    assert again.speech_model.model.encoder.conv1.in_channels == 128


def test_multilingual_ids_and_alignment_heads_survive(tokenizers, features, tmp_path):
    torch.manual_seed(0)
    speech = tiny_speech_model(tokenizers.speech)
    ids = speech.generation_config
    ids.lang_to_id = {
        f"<|{code}|>": tokenizers.speech.convert_tokens_to_ids(f"<|{code}|>") for code in ("en", "el", "yue")
    }
    ids.alignment_heads = [[0, 1], [1, 0], [1, 1]]
    ids.language = None
    again = check(assemble(tokenizers, speech=speech), features, tmp_path)
    assert again.speech_model.generation_config.lang_to_id == ids.lang_to_id
    assert again.speech_model.generation_config.alignment_heads == ids.alignment_heads
    encoder_outputs = again.speech_model.model.encoder(features)
    for code, name in (("en", "english"), ("el", "greek"), ("yue", "cantonese")):
        for language in (code, name):
            assert again.speech_prefix(encoder_outputs, language)[:, 1].tolist() == 3 * [ids.lang_to_id[f"<|{code}|>"]]
    transcripts = [again.generate(features, language=code).tolist() for code in ("en", "el")]
    assert transcripts[0] != transcripts[1]
    with pytest.raises(ValueError, match="it knows el, en, yue"):
        again.generate(features, language="french")


def test_suppressed_tokens_stay_out_of_the_hypothesis(tokenizers, features, tmp_path):
    torch.manual_seed(0)
    speech = tiny_speech_model(tokenizers.speech)
    free = assemble(tokenizers, speech=speech).listen(features).hypothesis_ids
    end = speech.config.eos_token_id
    never, first = free[:, 5:].unique().tolist(), [*free[:, 0].tolist(), end]
    speech.generation_config.suppress_tokens = never + [end + 1, end + 2]
    speech.generation_config.begin_suppress_tokens = first
    again = check(assemble(tokenizers, speech=speech), features, tmp_path)
    hypothesis = again.listen(features).hypothesis_ids
    assert not torch.isin(hypothesis, torch.tensor(never)).any()
    assert not torch.isin(hypothesis[:, 0], torch.tensor(first)).any()
    assert (hypothesis <= end).all()


def test_english_whisper(tokenizers, features, tmp_path):
    torch.manual_seed(0)
    speech = tiny_speech_model(tokenizers.speech)
    ids = speech.generation_config
    ids.is_multilingual = False
    del ids.lang_to_id, ids.task_to_id, ids.language, ids.task
    again = check(assemble(tokenizers, speech=speech), features, tmp_path)
    assert again.speech_prefix(again.speech_model.model.encoder(features)).shape == (3, 2)


def test_layers_that_audio_cannot_reach_are_refused(tokenizers, monkeypatch):
    def forward(self, hidden_states, attention_mask=None):
        return hidden_states

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", forward)
    with pytest.raises(ValueError, match="LlamaDecoderLayer takes no further keyword arguments"):
        assemble(tokenizers)
