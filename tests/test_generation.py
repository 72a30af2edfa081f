import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import assemble, tiny_speech_model, tiny_text_model
from transformers import CompileConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from voxkrikri import VoxKrikriForConditionalGeneration


FORMS = [
    pytest.param(mode, alignment, id=f"{mode}-{alignment}")
    for mode, alignment in (("full", "ratio"), ("causal", "ratio"), ("causal", "text"), ("causal", "copy"))
]
LENGTHS = (11, 4, 0)  # tokens of the three clips' hypotheses


@pytest.fixture(scope="module")
def model(tokenizers) -> VoxKrikriForConditionalGeneration:
    """Two injection layers, prior and LoRA; tests choose the mode by argument and must not change it."""
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    return assemble(tokenizers, injection_layers=[1, 2], alignment_prior=True, lora=lora)


def with_end_bias(model, bias: float = 2.0) -> VoxKrikriForConditionalGeneration:
    """A copy that likes to end: its end-of-text logit is raised."""
    model = copy.deepcopy(model)
    raised = torch.zeros(model.config.text_config.vocab_size)
    raised[model.end_token_ids] = bias
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + raised)
    return model


def aligned_by(model, alignment: str) -> VoxKrikriForConditionalGeneration:
    """A copy with alignment "ratio" or "text", or "copy": by text, and shown the hypothesis's next token."""
    model = copy.deepcopy(model)
    model.config.alignment = "ratio" if alignment == "ratio" else "text"
    if alignment == "copy":
        model.config.copy_hypothesis, model.config.copy_bias = True, 1.0
        for fusion in model.fusion:
            hidden = fusion.q_proj.in_features
            fusion.copy_proj = torch.nn.Linear(hidden, hidden, bias=False)
            torch.nn.init.normal_(fusion.copy_proj.weight, std=0.2)
    return model


def hear(model, features, lengths=LENGTHS) -> tuple[dict, list[dict]]:
    """What generate needs of all clips, whose hypotheses differ in length, and of each alone."""
    hypotheses = model.listen(features).hypothesis_ids
    singles = []
    for clip, length in enumerate(lengths):
        audio = model.listen(features[clip : clip + 1], hypothesis_ids=hypotheses[clip : clip + 1, :length])
        singles.append({**audio, "hypothesis_token_counts": torch.tensor([max(1, length - clip)])})
    padded = torch.full_like(hypotheses[:, : max(lengths)], model.config.speech_config.eos_token_id)
    for clip, length in enumerate(lengths):
        padded[clip, :length] = hypotheses[clip, :length]
    counts = torch.cat([single["hypothesis_token_counts"] for single in singles])
    return {**model.listen(features, hypothesis_ids=padded), "hypothesis_token_counts": counts}, singles


def without_padding(model, ids: torch.Tensor) -> list[int]:
    ends = torch.isin(ids, torch.tensor(model.end_token_ids)).nonzero()
    return ids[: int(ends[0]) + 1].tolist() if len(ends) else ids.tolist()


@torch.no_grad()
def decode_by_the_rule(model, single: dict, prompt: list[int], limit: int, lookahead: int = 0) -> SimpleNamespace:
    """Causal decoding as DESIGN's words say it: no cache, no batch, one row at a time. Ratio alignment."""
    states, count = int(single["state_lengths"]), int(single["hypothesis_token_counts"])
    ids, waits, ends = list(prompt), [0] * len(prompt), set(model.end_token_ids)
    logprobs = []
    while len(ids) < len(prompt) + limit and not (len(ids) > len(prompt) and ids[-1] in ends):
        positions = [max(-1, row - len(prompt) + 1) for row in range(len(ids))]
        logits = model(
            input_ids=torch.tensor([ids]),
            text_positions=torch.tensor([positions]),
            state_waits=torch.tensor([waits]),
            fusion_mode="causal",
            alignment_lookahead=lookahead,
            **single,
        ).logits[0, -1]
        token = int(logits.argmax())
        last_seen = min(states - 1, states * positions[-1] // count + lookahead + waits[-1])
        if token in ends and last_seen < states - 1:
            waits[-1] += 1
            continue
        ids.append(token)
        waits.append(waits[-1])
        logprobs.append(float(logits.log_softmax(-1)[token]))
    return SimpleNamespace(ids=ids[len(prompt) :], waits=waits[-1], last_seen=last_seen, logprobs=logprobs)


PROMPTS = [[5, 6, 7, 8], [9, 10], [11]]


def prompt_batch(model) -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    pad = model.generation_config.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]),
    }


# ---- equal answers


@pytest.mark.parametrize("prompted", [False, True], ids=["bare", "prompted"])
@pytest.mark.parametrize(("mode", "alignment"), FORMS)
def test_batch_is_one_by_one_and_cache_is_no_cache(model, features, mode, alignment, prompted):
    model = with_end_bias(aligned_by(model, alignment))
    audio, singles = hear(model, features)
    prompts = prompt_batch(model) if prompted else {}
    together = model.generate(**audio, **prompts, fusion_mode=mode)
    assert torch.equal(model.generate(**audio, **prompts, fusion_mode=mode, use_cache=False), together)
    for clip, single in enumerate(singles):
        prompt = {"input_ids": torch.tensor([PROMPTS[clip]])} if prompted else {}
        alone = model.generate(**single, **prompt, fusion_mode=mode)
        assert without_padding(model, alone[0]) == without_padding(model, together[clip])
    assert len({tuple(row) for row in together.tolist()}) > 1


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(("prompted", "bias"), [(False, 3.0), (True, 2.0)], ids=["bare", "prompted"])
def test_an_early_end_waits_for_the_next_state(model, features, prompted, bias, lookahead):
    model = with_end_bias(model, bias)
    audio, singles = hear(model, features)
    prompts = prompt_batch(model) if prompted else {}
    outputs = [
        model.generate(
            **audio,
            **prompts,
            fusion_mode="causal",
            alignment_lookahead=lookahead,
            return_dict_in_generate=True,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    waited = 0
    for clip, single in enumerate(singles):
        prompt = PROMPTS[clip] if prompted else [model.start_token_id]
        expected = decode_by_the_rule(model, single, prompt, limit=12, lookahead=lookahead)
        for output in outputs:
            assert without_padding(model, output.sequences[clip]) == expected.ids
            logprobs = torch.tensor(expected.logprobs)
            torch.testing.assert_close(output.token_logprobs[clip, : len(logprobs)], logprobs, rtol=1e-4, atol=1e-4)
            assert not output.token_logprobs[clip, len(logprobs) :].any()
        if expected.ids[-1] in model.end_token_ids:
            assert expected.last_seen == single["state_lengths"] - 1
        waited += expected.waits
    assert waited > 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
@pytest.mark.parametrize("alignment", ["ratio", "text"])
def test_beams_and_samples_do_not_end_before_the_last_state(model, features, options, alignment):
    model = with_end_bias(aligned_by(model, alignment), 30.0)
    audio, singles = hear(model, features)
    torch.manual_seed(0)
    lengths = [len(without_padding(model, row)) for row in model.generate(**audio, **options, fusion_mode="full")]
    assert lengths == [1, 1, 1]
    causal = model.generate(**audio, **options, fusion_mode="causal", max_new_tokens=16)
    for ids, single in zip(causal, singles, strict=True):
        ids = without_padding(model, ids)
        sees_all = []
        for t in range(len(ids)):
            rows = model.text_rows(torch.tensor([[model.start_token_id, *ids[:t]]]), 1, single["hypothesis_ids"])
            rows = {name: value[:, -1:] for name, value in rows.items()}
            sees_all.append(
                bool(
                    model.sees_last_state(
                        **rows,
                        state_lengths=single["state_lengths"],
                        hypothesis_ids=single["hypothesis_ids"],
                        hypothesis_token_counts=single["hypothesis_token_counts"],
                    )
                )
            )
        assert sees_all == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_stock_decoding_of_one_choice_is_greedy(model, features, mode):
    """transformers' sampling from the likeliest token alone takes another road than `greedy_search`."""
    audio, _ = hear(model, features)
    greedy = model.generate(**audio, fusion_mode=mode, return_dict_in_generate=True)
    assert torch.equal(model.generate(**audio, fusion_mode=mode, num_beams=1), greedy.sequences)
    assert torch.equal(model.generate(**audio, fusion_mode=mode, do_sample=True, top_k=1), greedy.sequences)


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_beams_find_no_worse_than_greedy(model, features, mode):
    """With as many beams as it takes to follow every start, and one length for all."""
    model = with_end_bias(model, -30.0)
    audio, singles = hear(model, features)
    options = {"fusion_mode": mode, "max_new_tokens": 2, "return_dict_in_generate": True}
    greedy = model.generate(**audio, **options)
    beams = model.generate(**audio, num_beams=len(model.text_bytes) // 2, **options)
    assert (beams.token_logprobs.sum(-1) >= greedy.token_logprobs.sum(-1) - 1e-4).all()
    few = model.generate(**audio, num_beams=3, **options)
    for clip, single in enumerate(singles):
        alone = model.generate(**single, num_beams=3, **options)
        assert torch.equal(alone.sequences[0], few.sequences[clip])
        torch.testing.assert_close(alone.token_logprobs[0], few.token_logprobs[clip], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_token_logprobs_are_those_of_the_teacher_forced_text(model, features, options):
    torch.manual_seed(0)
    model = with_end_bias(model)
    audio, _ = hear(model, features)
    output = model.generate(**audio, fusion_mode="full", return_dict_in_generate=True, top_k=0, **options)
    start = torch.full((len(output.sequences), 1), model.start_token_id)
    input_ids = torch.cat([start, output.sequences], dim=1)
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    logits = model(input_ids=input_ids, text_positions=positions, fusion_mode="full", **audio).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, output.sequences[..., None]).squeeze(-1)
    for clip, ids in enumerate(output.sequences):
        length = len(without_padding(model, ids))
        torch.testing.assert_close(output.token_logprobs[clip, :length], logprobs[clip, :length], rtol=1e-4, atol=1e-4)
        assert not output.token_logprobs[clip, length:].any()
    assert torch.equal(output.audio_states, audio["audio_states"])
    assert torch.equal(output.hypothesis_ids, audio["hypothesis_ids"])


def test_sampling_repeats_with_its_seed(model, features):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(features, do_sample=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_features_are_what_listen_makes_of_them(model, features):
    ids = model.generate(features)
    audio = model.listen(features)
    assert torch.equal(model.generate(**audio), ids)
    assert torch.equal(model.generate(features, hypothesis_ids=audio.hypothesis_ids), ids)
    assert torch.equal(model.generate(audio_states=audio.audio_states), ids)  # no padding: S is their number
    assert not torch.equal(model.generate(features.flip(0)), ids)


def test_the_configured_mode_is_the_default(model, features):
    audio, _ = hear(model, features)
    full = model.generate(**audio, fusion_mode="full")
    causal = model.generate(**audio, fusion_mode="causal")
    assert not torch.equal(full, causal)
    assert torch.equal(model.generate(**audio), full)
    model = copy.deepcopy(model)
    model.config.fusion_mode = "causal"
    assert torch.equal(model.generate(**audio), causal)
    assert torch.equal(model.generate(**audio, alignment_lookahead=99), full)


# ---- Whisper's part


def test_states_are_those_of_decoding_step_by_step(model, features):
    audio = model.listen(features)
    encoder_outputs = model.speech_model.model.encoder(features)
    prefix = model.speech_prefix(encoder_outputs)
    cache, states = None, []
    for step in range(audio.hypothesis_ids.shape[1] + 1):
        ids = prefix if step == 0 else audio.hypothesis_ids[:, step - 1 : step]
        output = model.speech_model.model.decoder(
            input_ids=ids,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        states.append(output.last_hidden_state[:, -1])
    torch.testing.assert_close(audio.audio_states, torch.stack(states, dim=1), rtol=1e-4, atol=1e-4)
    scores = model.speech_model.proj_out(audio.audio_states[:, :-1])
    end = model.config.speech_config.eos_token_id
    assert torch.equal(scores[..., : end + 1].argmax(-1), audio.hypothesis_ids)  # A_s predicts h_s


def test_padding_of_hypotheses_changes_no_state(model, features):
    together, singles = hear(model, features)
    assert together["state_lengths"].tolist() == [length + 1 for length in LENGTHS]
    for clip, single in enumerate(singles):
        states = single["audio_states"][0]
        assert len(states) == LENGTHS[clip] + 1
        torch.testing.assert_close(together["audio_states"][clip, : len(states)], states, rtol=1e-5, atol=1e-5)


def test_hypotheses_of_a_batch_are_those_of_its_clips(model, features):
    model = copy.deepcopy(model)
    raised = torch.zeros(model.config.speech_config.vocab_size)
    raised[model.config.speech_config.eos_token_id] = 5.0  # the clips end at different steps
    model.speech_model.proj_out.register_forward_hook(lambda module, args, logits: logits + raised)
    together = model.listen(features)
    lengths = []
    for clip in range(len(features)):
        alone = model.listen(features[clip : clip + 1])
        lengths.append(alone.hypothesis_ids.shape[1])
        assert torch.equal(together.hypothesis_ids[clip, : lengths[-1]], alone.hypothesis_ids[0])
        assert together.state_lengths[clip] == lengths[-1] + 1
    assert together.hypothesis_ids.shape[1] == max(lengths)
    assert len(set(lengths)) > 1


def test_compiled_steps_of_whisper_hear_the_same_and_are_compiled_once(model, features):
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    graphs = []
    for hear_these in (features, features.flip(0), features * 0.5):
        plain = model.listen(hear_these)
        static = model.listen(hear_these, cache_implementation="static", compile_config=config)
        assert torch.equal(static.hypothesis_ids, plain.hypothesis_ids)
        torch.testing.assert_close(static.audio_states, plain.audio_states, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2] == graphs[1] == graphs[0]


def test_the_generation_configuration_says_how_both_parts_cache(model, features):
    model = copy.deepcopy(model)
    ids = model.generate(features)
    model.generation_config.cache_implementation = "static"
    asked, write = [], model.generate_hypothesis
    model.generate_hypothesis = lambda *args, **options: asked.append(options) or write(*args, **options)
    assert torch.equal(model.generate(features), ids)
    assert asked[0]["cache_implementation"] == "static"
    assert model._static_cache
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(ValueError, match='"dynamic" or "static", got \'quantized\''):
        model.generate(features)


@pytest.mark.parametrize("language", ["el", "greek", "Greek", "EL", None])
def test_language_by_code_name_or_default(model, features, language):
    encoder_outputs = model.speech_model.model.encoder(features)
    prefix = model.speech_prefix(encoder_outputs, language)
    ids = model.speech_model.generation_config
    assert prefix.tolist() == 3 * [
        [
            ids.decoder_start_token_id,
            ids.lang_to_id["<|el|>"],
            ids.task_to_id["transcribe"],
            ids.no_timestamps_token_id,
        ]
    ]


def test_without_a_default_the_language_is_detected(model, features):
    model = copy.deepcopy(model)
    ids = model.speech_model.generation_config
    ids.language, ids.lang_to_id = None, {"<|el|>": ids.lang_to_id["<|el|>"], "<|en|>": ids.lang_to_id["<|el|>"] - 1}
    encoder_outputs = model.speech_model.model.encoder(features)
    start = torch.full((len(features), 1), ids.decoder_start_token_id)
    logits = model.speech_model(encoder_outputs=encoder_outputs, decoder_input_ids=start).logits[:, -1]
    known = torch.tensor(list(ids.lang_to_id.values()))
    assert torch.equal(model.speech_prefix(encoder_outputs)[:, 1], known[logits[:, known].argmax(-1)])


def test_an_unknown_language_is_refused_with_those_known(model, features):
    with pytest.raises(ValueError, match="'klingon' .* it knows el"):
        model.generate(features, language="klingon")
    with pytest.raises(ValueError, match="'french' .* it knows el"):
        model.generate(features, language="french")


def test_an_english_whisper_takes_no_language(tokenizers, features):
    speech = tiny_speech_model(tokenizers.speech)
    ids = speech.generation_config
    ids.is_multilingual = False
    del ids.lang_to_id, ids.task_to_id, ids.language, ids.task
    model = assemble(tokenizers, speech=speech)
    encoder_outputs = model.speech_model.model.encoder(features)
    assert model.speech_prefix(encoder_outputs).tolist() == 3 * [
        [ids.decoder_start_token_id, ids.no_timestamps_token_id]
    ]
    assert model.generate(features).shape[1] > 0
    with pytest.raises(ValueError, match="'el' .* not multilingual"):
        model.generate(features, language="el")


# ---- the interface


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_tokens_as_they_come(model, features):
    recorder = Recorder()
    prompt = torch.tensor([PROMPTS[0]])
    ids = model.generate(features[:1], prompt, streamer=recorder)
    assert recorder.tokens == PROMPTS[0] + ids[0].tolist()
    assert recorder.ended


def test_generation_options_reach_transformers(model, features):
    ids = model.generate(features, max_new_tokens=6)
    assert ids.shape == (3, 6)
    banned = model.generate(features, max_new_tokens=6, bad_words_ids=[[int(ids[0, 0])]])
    assert banned[0, 0] != ids[0, 0]
    config = GenerationConfig(max_new_tokens=6, eos_token_id=model.end_token_ids[0], pad_token_id=0)
    assert torch.equal(model.generate(features, generation_config=config), ids)
    stopped = model.generate(features[:1], max_new_tokens=6, eos_token_id=[*model.end_token_ids, int(ids[0, 2])])
    assert stopped[0].tolist() == ids[0, :3].tolist()


def test_text_starts_from_what_the_llm_has(tokenizers):
    for changes, start in (
        ({}, tokenizers.text.bos_token_id),
        ({"bos_token_id": None}, tokenizers.text.pad_token_id),
        ({"bos_token_id": None, "pad_token_id": None, "eos_token_id": [7, 8]}, 7),
    ):
        model = assemble(tokenizers, text=tiny_text_model(tokenizers.text, **changes))
        assert model.start_token_id == start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"input_features": None}, "either input_features or audio_states", id="no-audio"),
        pytest.param({"audio_states": torch.zeros(3, 2, 16)}, "either input_features or audio_states", id="both"),
        pytest.param({"input_ids": torch.ones(2, 1, dtype=torch.long)}, "2 prompts for 3 clips", id="prompts"),
        pytest.param({"fusion_mode": "half"}, "'full', 'causal'.*'half'", id="mode"),
    ],
)
def test_bad_input_is_named(model, features, changes, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_features": features} | changes)


def test_text_alignment_needs_the_hypothesis(model, features):
    states = model.listen(features).audio_states
    with pytest.raises(ValueError, match="give hypothesis_ids"):
        aligned_by(model, "text").generate(audio_states=states)
