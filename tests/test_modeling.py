import copy

import pytest
import torch
from conftest import assemble, tiny_speech_model, tiny_text_model

from voxkrikri import VoxKrikriConfig, VoxKrikriForConditionalGeneration, modeling_voxkrikri
from voxkrikri.alignment_voxkrikri import alignment_mask
from voxkrikri.modeling_voxkrikri import CrossModalFusion, positions_from_labels


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
TEXT = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
FORMS = [
    pytest.param(mode, {"alignment": alignment, "alignment_prior": prior}, id=f"{mode}-{alignment}{'-prior' * prior}")
    for mode, alignment in (("full", "ratio"), ("causal", "ratio"), ("causal", "text"))
    for prior in (False, True)
] + [
    pytest.param(mode, {"alignment": "text", "copy_hypothesis": True}, id=f"{mode}-copy")
    for mode in ("full", "causal")
]
BOTH_MODES = pytest.mark.parametrize("mode", ["full", "causal"])


def make_clip(model, prompt: int, tokens: int, states: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One clip as forward takes it: a prompt, a transcript with its end, and states that Whisper did not make."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 300, (1, prompt + tokens), generator=generator)
    text[:, -1] = model.end_token_ids[0]
    labels = text.clone()
    labels[:, :prompt] = -100
    return {
        "input_ids": text,
        "labels": labels,
        "audio_states": torch.randn(1, states, model.config.speech_config.d_model, generator=generator),
        "state_lengths": torch.tensor([states]),
        "hypothesis_ids": torch.randint(1, 300, (1, states - 1), generator=generator),
        "hypothesis_token_counts": torch.tensor([max(1, tokens - 1)]),
    }


def make_clips(model) -> list[dict[str, torch.Tensor]]:
    return [make_clip(model, *sizes) for sizes in ((1, 6, 8, 1), (4, 3, 3, 2), (2, 9, 1, 3), (3, 2, 12, 4))]


def collate(model, clips: list[dict]) -> dict[str, torch.Tensor]:
    """Text padded on the left, hypotheses on the right, and the states beyond S full of noise."""
    rows = max(clip["labels"].shape[1] for clip in clips)
    states = max(int(clip["state_lengths"]) for clip in clips)
    end = model.config.speech_config.eos_token_id

    def left(name: str, filler: int) -> torch.Tensor:
        pads = [torch.full((1, rows - clip[name].shape[1]), filler) for clip in clips]
        return torch.cat([torch.cat([pad, clip[name]], dim=1) for pad, clip in zip(pads, clips, strict=True)])

    def right(name: str, length: int, filler: float) -> torch.Tensor:
        shape = [(length - clip[name].shape[1], *clip[name].shape[2:]) for clip in clips]
        pads = [torch.full((1, *size), filler, dtype=clips[0][name].dtype) for size in shape]
        return torch.cat([torch.cat([clip[name], pad], dim=1) for pad, clip in zip(pads, clips, strict=True)])

    lengths = torch.tensor([[clip["labels"].shape[1]] for clip in clips])
    return {
        "input_ids": left("input_ids", 5),
        "labels": left("labels", -100),
        "attention_mask": (torch.arange(rows) >= rows - lengths).long(),
        "audio_states": right("audio_states", states, 9.0),
        "hypothesis_ids": right("hypothesis_ids", states - 1, end),
        "state_lengths": torch.cat([clip["state_lengths"] for clip in clips]),
        "hypothesis_token_counts": torch.cat([clip["hypothesis_token_counts"] for clip in clips]),
    }


def visible_states(clip: dict, lookahead: int = 0) -> list[int]:
    """s_t of every row up to the end of text by Eq. 3, -1 in the prompt; the row that predicts the end sees all."""
    states, count = int(clip["state_lengths"]), int(clip["hypothesis_token_counts"])
    tokens = int((clip["labels"] != -100).sum())
    prompt_rows = [-1] * (clip["labels"].shape[1] - tokens - 1)
    return prompt_rows + [min(states - 1, states * t // count + lookahead) for t in range(tokens - 1)] + [states - 1]


# ---- equations


@pytest.mark.parametrize("prior", [False, True], ids=["eq5", "prior"])
def test_one_head_without_norm_is_equation_5(prior):
    torch.manual_seed(0)
    config = VoxKrikriConfig(
        speech_config={"d_model": 6},
        text_config=TEXT,
        fusion_heads=1,
        fusion_norm=False,
        alignment_prior=prior,
    )
    fusion = CrossModalFusion(config)
    h, audio = torch.randn(1, 5, 8), torch.randn(1, 4, 6)
    mask = alignment_mask(torch.arange(5)[None], torch.tensor([[0, 0, 1, 3, 3]]), 4)
    offsets = torch.randn(1, 5, 4)
    m = torch.zeros(1, 5, 4).masked_fill(~mask, -torch.inf)
    if prior:
        torch.nn.init.constant_(fusion.log_sigma, 0.3)
        torch.nn.init.constant_(fusion.prior_shift, 0.8)
        m = m - (offsets - 0.8) ** 2 / (2 * torch.tensor(0.3).exp() ** 2)

    q, k, v = (projection.weight.T for projection in (fusion.q_proj, fusion.k_proj, fusion.v_proj))
    scores = (h @ q) @ (audio @ k).transpose(1, 2) / 8**0.5 + m
    expected = scores.softmax(-1) @ (audio @ v)

    added = fusion(h, *fusion.project_audio(audio), mask, offsets, torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(added, expected)


def test_heads_work_apart():
    torch.manual_seed(0)
    config = VoxKrikriConfig(speech_config={"d_model": 6}, text_config=TEXT, fusion_heads=2)
    fusion = CrossModalFusion(config)
    h, audio = torch.randn(1, 3, 8), torch.randn(1, 4, 6)
    everything = torch.ones(1, 3, 4, dtype=torch.bool), torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    y = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    q, k, v = fusion.q_proj(y), fusion.k_proj(audio), fusion.v_proj(audio)
    expected = [
        (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1) @ v[..., part]
        for part in (slice(4), slice(4, 8))
    ]
    added = fusion(h, *fusion.project_audio(audio), *everything)
    torch.testing.assert_close(added, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_loss_in_chunks_is_the_loss_and_has_its_gradients(tokenizers, chunk_size):
    model = assemble(tokenizers, lora=LORA)
    model.freeze_backbones()
    clips = [make_clip(model, 2, 6, 5, seed=seed) for seed in range(3)]
    batch = {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}
    batch["labels"][0, -3:] = -100

    def loss_and_gradients(**options):
        model.zero_grad()
        output = model(**batch, num_items_in_batch=20, **options)
        output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, expected), (chunked, gradients) = loss_and_gradients(), loss_and_gradients(loss_chunk_size=chunk_size)
    assert chunked.logits is None and torch.allclose(whole.loss, chunked.loss, atol=1e-6)
    assert expected.keys() == gradients.keys()
    for name, value in expected.items():
        assert torch.allclose(value, gradients[name], atol=1e-6), name
    assert torch.allclose(model(**batch).loss, model(**batch, loss_chunk_size=chunk_size).loss, atol=1e-6)


def test_the_loss_in_chunks_refuses_an_llm_that_changes_its_logits(tokenizers):
    model = assemble(tokenizers)
    model.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        model(**make_clip(model, 2, 6, 5), loss_chunk_size=4)


@pytest.fixture(params=["peft", "without peft"])
def adapted(request, tokenizers, monkeypatch):
    """A model whose adapter says something, and the same LLM without it."""
    if request.param == "without peft":
        monkeypatch.setattr(modeling_voxkrikri, "LoraConfig", None)
    torch.manual_seed(0)
    text = tiny_text_model(tokenizers.text)
    plain = copy.deepcopy(text)
    model = assemble(tokenizers, text=text, lora=LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, plain


def test_without_its_adapter_the_llm_is_the_plain_one(adapted):
    model, plain = adapted
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    with model.without_lora():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(before, plain(input_ids=ids).logits, atol=1e-2)


def test_a_merged_adapter_says_the_same_and_is_gone(adapted, tmp_path):
    model, _ = adapted
    clip = make_clip(model, 2, 6, 5)
    before = model(**clip).logits
    model.merge_lora()
    assert torch.allclose(model(**clip).logits, before, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**clip).logits, model(**clip).logits)


def test_positions_from_labels():
    labels = torch.tensor([[-100, -100, 7, 8, 9, -100], [4, 5, -100, -100, -100, -100]])
    assert positions_from_labels(labels).tolist() == [[-1, 0, 1, 2, -1, -1], [0, -1, -1, -1, -1, -1]]


# ---- equal answers


@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
@BOTH_MODES
def test_untrained_fusion_leaves_the_llm_as_it_is(tokenizers, lora, mode):
    torch.manual_seed(0)
    text, speech = tiny_text_model(tokenizers.text), tiny_speech_model(tokenizers.speech)
    plain = copy.deepcopy(text)
    model = VoxKrikriForConditionalGeneration.from_pretrained_backbones(
        speech,
        text,
        tokenizer=tokenizers.text,
        speech_tokenizer=tokenizers.speech,
        lora=lora,
        injection_layers=[1, 3],
        fusion_mode=mode,
        alignment="text",
        copy_hypothesis=True,
    ).eval()
    clip = make_clip(model, 2, 6, 5)
    assert torch.equal(model(**clip).logits, plain(input_ids=clip["input_ids"]).logits)
    assert torch.equal(model(input_ids=clip["input_ids"]).logits, plain(input_ids=clip["input_ids"]).logits)
    torch.nn.init.ones_(model.fusion[0].v_proj.weight)
    assert not torch.equal(model(**clip).logits, plain(input_ids=clip["input_ids"]).logits)


@pytest.mark.parametrize(("mode", "form"), FORMS)
def test_batch_is_one_by_one(tokenizers, mode, form):
    model = assemble(tokenizers, fusion_mode=mode, injection_layers=[1, 2], lora=LORA, **form)
    clips = make_clips(model)
    together = model(**collate(model, clips))
    losses = []
    for clip, logits in zip(clips, together.logits, strict=True):
        alone = model(**clip)
        torch.testing.assert_close(logits[-alone.logits.shape[1] :], alone.logits[0], rtol=1e-4, atol=1e-4)
        losses += [alone.loss] * int((clip["labels"] != -100).sum())
    torch.testing.assert_close(together.loss, torch.stack(losses).mean())


def test_eager_is_sdpa(tokenizers):
    model = assemble(tokenizers, fusion_mode="causal", lora=LORA)
    batch = collate(model, make_clips(model))
    features = torch.randn(2, 80, 100)
    logits, states = model(**batch).logits, model.listen(features).audio_states
    assert model.language_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.language_model.config._attn_implementation == "eager"
    assert model.speech_model.config._attn_implementation == "eager"
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.listen(features).audio_states, states, rtol=1e-5, atol=1e-5)


def test_features_are_what_listen_makes_of_them(tokenizers):
    model = assemble(tokenizers)
    features = torch.randn(1, 80, 100)
    clip = make_clip(model, 2, 6, 5)
    text = {name: clip[name] for name in ("input_ids", "labels", "hypothesis_token_counts")}
    audio = model.listen(features)
    keys, values = model.project_audio(audio.audio_states)
    logits = model(input_features=features, **text).logits
    assert torch.equal(model(**audio, **text).logits, logits)
    assert torch.equal(
        model(audio_keys=keys, audio_values=values, state_lengths=audio.state_lengths, **text).logits, logits
    )
    assert torch.equal(model(input_features=features, hypothesis_ids=audio.hypothesis_ids, **text).logits, logits)
    shorter = model(input_features=features, hypothesis_ids=audio.hypothesis_ids[:, :3], **text).logits
    assert not torch.equal(shorter, logits)


# ---- what a row may see


@pytest.mark.parametrize("lookahead", [0, 2])
def test_causal_rows_never_see_a_later_state(tokenizers, lookahead):
    model = assemble(
        tokenizers,
        fusion_mode="causal",
        alignment_lookahead=lookahead,
        alignment_prior=True,
        injection_layers=[1, 2],
    )
    clip = make_clip(model, 2, 8, 9) | {"hypothesis_token_counts": torch.tensor([12])}
    seen = torch.tensor(visible_states(clip, lookahead))
    logits = model(**clip).logits[0]
    for state in range(9):
        states = clip["audio_states"].clone()
        states[:, state] += 1
        changed = (model(**clip | {"audio_states": states}).logits[0] != logits).any(-1)[:-1]
        assert not changed[seen < state].any()
        assert changed[(seen >= state).nonzero()[0]]


def test_lookahead_as_an_argument_is_the_configurations(tokenizers):
    model = assemble(tokenizers, fusion_mode="causal", alignment_lookahead=2)
    clip = make_clip(model, 2, 8, 9)
    logits = model(**clip).logits
    model.config.alignment_lookahead = 0
    assert torch.equal(model(**clip, alignment_lookahead=2).logits, logits)
    assert not torch.equal(model(**clip).logits, logits)


def test_lookahead_beyond_the_states_is_full_fusion(tokenizers):
    model = assemble(tokenizers)
    clip = make_clip(model, 2, 8, 9)
    full = model(**clip).logits
    assert torch.equal(model(**clip, fusion_mode="causal", alignment_lookahead=9).logits, full)
    causal = model(**clip, fusion_mode="causal").logits
    assert not torch.equal(causal, full)
    positions = positions_from_labels(clip["labels"])
    without_end = {name: value for name, value in clip.items() if name != "labels"} | {"text_positions": positions}
    assert torch.equal(model(**without_end, fusion_mode="causal", alignment_lookahead=8).logits, full)


@BOTH_MODES
def test_prompt_rows_get_no_audio(tokenizers, mode):
    model = assemble(tokenizers, fusion_mode=mode, injection_layers=[1, 2])
    clip = make_clip(model, 4, 5, 6)
    plain = model(input_ids=clip["input_ids"]).logits[0]
    fused = model(**clip).logits[0]
    assert torch.equal(fused[:3], plain[:3])
    assert (fused[3:] != plain[3:]).any(-1).all()


@pytest.mark.parametrize(("states", "count"), [(1, 1), (1, 9), (4, 9), (9, 1)])
@pytest.mark.parametrize("alignment", ["ratio", "text"])
@BOTH_MODES
def test_extreme_lengths(tokenizers, states, count, alignment, mode):
    """A hypothesis that is empty (S = 1), shorter than the text (T > S) or far longer."""
    model = assemble(tokenizers, alignment=alignment, alignment_prior=True, fusion_mode=mode).train()
    model.set_attn_implementation("eager")
    clip = make_clip(model, 3, 6, states) | {"hypothesis_token_counts": torch.tensor([count])}
    loss = model(**clip).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.fusion.parameters())
    audio = {name: value for name, value in clip.items() if name not in ("input_ids", "labels")}
    assert model.eval().generate(**audio).shape[1] > 0


def test_two_injection_layers_add_each_its_own(tokenizers):
    model = assemble(tokenizers, injection_layers=[1, 2])
    clip = make_clip(model, 1, 6, 5)
    both = model(**clip, output_hidden_states=True).hidden_states
    silent = copy.deepcopy(model)
    for fusion in silent.fusion:
        torch.nn.init.zeros_(fusion.v_proj.weight)
    plain = silent(**clip, output_hidden_states=True).hidden_states
    silent.fusion[0].load_state_dict(model.fusion[0].state_dict())
    first = silent(**clip, output_hidden_states=True).hidden_states
    seen = torch.ones(1, 7, 5, dtype=torch.bool), torch.zeros(1, 7, 5), positions_from_labels(clip["labels"]) >= 0
    for index, (before, after) in enumerate(((plain[1], both[1]), (first[2], both[2]))):
        fusion = model.fusion[index]
        added = fusion(before, *fusion.project_audio(clip["audio_states"]), *seen)
        assert added.abs().max() > 0.1
        torch.testing.assert_close(after, before + added)
    assert torch.equal(both[0], plain[0])


def test_hidden_states_are_the_fused_ones_from_the_injection_on(tokenizers):
    model = assemble(tokenizers, injection_layers=[2])
    clip = make_clip(model, 1, 6, 5)
    plain = model(input_ids=clip["input_ids"], output_hidden_states=True).hidden_states
    fused = model(**clip, output_hidden_states=True).hidden_states
    assert len(fused) == 4
    assert [torch.equal(one, other) for one, other in zip(plain, fused, strict=True)] == [True, True, False, False]


# ---- training


@pytest.mark.parametrize("trained", [[], ["lm_head"]], ids=["lora", "lora-and-head"])
@BOTH_MODES
def test_gradients_go_where_training_goes(tokenizers, mode, trained):
    model = assemble(
        tokenizers, fusion_mode=mode, alignment_prior=True, lora=LORA, trained_text_modules=trained
    ).train()
    model(**collate(model, make_clips(model))).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("fusion.") or ".lora_" in name or (trained and name == "language_model.lm_head.weight"):
            assert model.is_trained(name)
            assert parameter.grad.isfinite().all(), name
        else:
            assert not model.is_trained(name)
            assert parameter.grad is None, name
    assert all(fusion.q_proj.weight.grad.any() and fusion.log_sigma.grad.any() for fusion in model.fusion)


@BOTH_MODES
def test_loss_falls_and_the_frozen_stays_frozen_after_reload(tokenizers, tmp_path, mode):
    assemble(tokenizers, fusion_mode=mode, lora=LORA).save_pretrained(tmp_path)
    model = VoxKrikriForConditionalGeneration.from_pretrained(tmp_path)
    model.freeze_backbones()
    model.train()
    assert not any(module.training for module in model.speech_model.modules())
    assert model.language_model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    batch = collate(model, make_clips(model))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if model.is_trained(name)}


def test_gradient_checkpointing_changes_nothing_but_memory(tokenizers):
    model = assemble(tokenizers, fusion_mode="causal", alignment_prior=True, lora=LORA).train()
    batch = collate(model, make_clips(model))
    calls = []
    model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: value.grad for name, value in model.named_parameters() if value.requires_grad}))
    assert len(calls) == 1 + 2  # once, then twice: the second time within the backward pass
    (loss, grads), (loss_again, grads_again) = results
    torch.testing.assert_close(loss_again, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad)


def test_loss_of_accumulated_batches_is_that_of_one(tokenizers):
    model = assemble(tokenizers)
    clips = make_clips(model)
    count = sum(int((clip["labels"] != -100).sum()) for clip in clips)
    parts = sum(model(**clip, num_items_in_batch=count).loss for clip in clips)
    torch.testing.assert_close(parts, model(**collate(model, clips)).loss)


# ---- housekeeping


@BOTH_MODES
def test_bfloat16_runs(tokenizers, mode, features):
    model = assemble(tokenizers, fusion_mode=mode, alignment_prior=True, lora=LORA)
    batch = collate(model, make_clips(model))
    loss = model(**batch).loss
    model.to(torch.bfloat16)
    output = model(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(loss.item(), rel=0.05)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.fusion.parameters())
    assert model.generate(features, return_dict_in_generate=True).token_logprobs.isfinite().all()


def test_a_copy_uses_its_own_fusion(tokenizers):
    model = assemble(tokenizers)
    clip = make_clip(model, 1, 6, 5)
    logits, plain = model(**clip).logits, model(input_ids=clip["input_ids"]).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**clip).logits, logits)
    torch.nn.init.zeros_(twin.fusion[0].v_proj.weight)
    assert torch.equal(twin(**clip).logits, plain)
    assert torch.equal(model(**clip).logits, logits)


def test_assembling_leaves_the_backbones_as_they_are(tokenizers, tmp_path):
    torch.manual_seed(0)
    speech, text = tiny_speech_model(tokenizers.speech), tiny_text_model(tokenizers.text)
    speech.save_pretrained(tmp_path / "speech")
    text.save_pretrained(tmp_path / "text")
    for sources in ((str(tmp_path / "speech"), str(tmp_path / "text")), (speech, text)):
        saved = {
            "speech_model": {name: value.clone() for name, value in speech.state_dict().items()},
            "language_model": {name: value.clone() for name, value in text.state_dict().items()},
        }
        model = VoxKrikriForConditionalGeneration.from_pretrained_backbones(*sources, alignment_prior=True)
        for part, state in saved.items():
            for name, value in getattr(model, part).state_dict().items():
                assert torch.equal(value, state[name]), name
        assert not model.fusion[0].v_proj.weight.any()
        assert model.fusion[0].q_proj.weight.std().item() == pytest.approx(0.3, rel=0.1)  # the LLM's initializer_range
        torch.testing.assert_close(model.fusion[0].log_sigma.exp(), 2.0 ** torch.linspace(-1, 1, 4))
        assert model.fusion[0].prior_shift.tolist() == [0, 1, 2, 3]
        assert {name for name, value in model.named_parameters() if value.requires_grad} == {
            f"fusion.0.{name}" for name, _ in model.fusion[0].named_parameters()
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"input_ids": None}, r"generate\(input_features=", id="no-text"),
        pytest.param({"fusion_mode": "half"}, "'full', 'causal'.*'half'", id="mode"),
        pytest.param({"state_lengths": None}, "audio_states need state_lengths", id="no-lengths"),
        pytest.param({"labels": None}, "text_positions or labels", id="no-place"),
        pytest.param({"hypothesis_ids": None}, 'alignment="text" needs the hypothesis', id="no-hypothesis"),
    ],
)
def test_bad_input_is_named(tokenizers, changes, message):
    model = assemble(tokenizers, alignment="text")
    with pytest.raises(ValueError, match=message):
        model(**make_clip(model, 1, 3, 3) | changes)


def test_text_alignment_needs_the_tokenizers(tokenizers):
    with pytest.raises(ValueError, match="give both tokenizer and speech_tokenizer"):
        VoxKrikriForConditionalGeneration.from_pretrained_backbones(
            tiny_speech_model(tokenizers.speech), tiny_text_model(tokenizers.text), alignment="text"
        )


def test_a_trained_module_that_is_not_there_is_named(tokenizers):
    with pytest.raises(ValueError, match="'lm_haed'"):
        assemble(tokenizers, trained_text_modules=["lm_haed"])
    tied = tiny_text_model(tokenizers.text, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head'.*embed_tokens"):
        assemble(tokenizers, text=tied, trained_text_modules=["lm_head"])


def test_an_llm_without_end_of_text_is_refused(tokenizers):
    endless = tiny_text_model(tokenizers.text, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id"):
        assemble(tokenizers, text=endless)
