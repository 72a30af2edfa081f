"""A draft changes how often the LLM runs and nothing else."""

import copy
import os
import random

import pytest
import torch
from conftest import assemble, tiny_text_model
from test_generation import FORMS, LENGTHS, PROMPTS, aligned_by, hear, prompt_batch, with_end_bias, without_padding
from test_generation import model as model  # the fixture
from transformers import (
    CompileConfig,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from voxkrikri.alignment_voxkrikri import TextFollower
from voxkrikri.greedy_voxkrikri import COMPILED_WIDTHS, Clip, Draft, offered_width


def edit(ids: list[int], rng: random.Random, share: float) -> list[int]:
    """`ids` with about a share of them replaced, left out or doubled."""
    edited = []
    for token in ids:
        kind = rng.choice(["replace", "leave out", "insert"]) if rng.random() < share else "keep"
        edited += {"replace": [rng.randrange(300)], "leave out": [], "insert": [token, rng.randrange(300)]}.get(
            kind, [token]
        )
    return edited


def drafts_like(texts: list[list[int]], kind: str, end: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of drafts of one kind for these texts."""
    rng = random.Random(f"{kind} {seed}")
    make = {
        "empty": lambda ids: [],
        "the text": lambda ids: ids,
        "edited": lambda ids: edit(ids, rng, 0.2),
        "much edited": lambda ids: edit(ids, rng, 0.7),
        "of another": lambda ids: [rng.randrange(300) for _ in range(30)],
        "over-long": lambda ids: ids[:-1] + [rng.randrange(300) for _ in range(200)],
        "ends at once": lambda ids: [end],
        "without an end": lambda ids: ids[: len(ids) // 2],
    }[kind]
    rows = [make(ids) for ids in texts]
    width = max(1, *map(len, rows))
    starts = [[rng.random() < 0.5 for _ in range(width)] for _ in rows]
    return {
        "draft_ids": torch.tensor([row + [-1] * (width - len(row)) for row in rows]),
        "draft_word_starts": torch.tensor(starts),
    }


KINDS = ["empty", "the text", "edited", "much edited", "of another", "over-long", "ends at once", "without an end"]


@pytest.mark.parametrize("bias", [0.0, 3.0], ids=["", "early ends"])
@pytest.mark.parametrize("prompted", [False, True], ids=["bare", "prompted"])
@pytest.mark.parametrize(("mode", "alignment"), FORMS)
def test_any_draft_gives_the_tokens_of_none(model, features, mode, alignment, prompted, bias):  # noqa: F811
    model = with_end_bias(aligned_by(model, alignment), bias)
    audio, singles = hear(model, features)
    options = {"fusion_mode": mode, "return_dict_in_generate": True, "max_new_tokens": 24}
    prompts = prompt_batch(model) if prompted else {}
    plain = model.generate(**audio, **prompts, **options)
    texts = [without_padding(model, ids) for ids in plain.sequences]
    assert not plain.drafted.any()
    for kind in KINDS:
        drafts = drafts_like(texts, kind, model.end_token_ids[0])
        drafted = model.generate(**audio, **prompts, **drafts, **options)
        assert torch.equal(drafted.sequences, plain.sequences), kind
        assert torch.allclose(drafted.token_logprobs, plain.token_logprobs, atol=1e-4), kind
        assert drafted.passes <= plain.passes, kind
        assert (drafted.accepted <= drafted.drafted).all()
        uncached = model.generate(**audio, **prompts, **drafts, **options, use_cache=False)
        assert torch.equal(uncached.sequences, plain.sequences), kind
        for clip, single in enumerate(singles):
            prompt = {"input_ids": torch.tensor([PROMPTS[clip]])} if prompted else {}
            own = {name: value[clip : clip + 1] for name, value in drafts.items()}
            alone = model.generate(**single, **prompt, **own, **options)
            assert without_padding(model, alone.sequences[0]) == texts[clip], kind


def test_a_perfect_draft_needs_one_pass_and_a_wrong_word_two_more(model, features):  # noqa: F811
    _, singles = hear(model, features)
    audio = singles[0]
    options = {"fusion_mode": "full", "return_dict_in_generate": True, "max_new_tokens": 24}
    plain = model.generate(**audio, **options)
    texts = [without_padding(model, ids) for ids in plain.sequences]
    assert plain.passes == max(map(len, texts))
    drafts = drafts_like(texts, "the text", model.end_token_ids[0])
    assert model.generate(**audio, **drafts, **options).passes == 1
    drafts["draft_ids"][:, 5] = 7
    drafts["draft_word_starts"][:] = True
    assert 2 <= model.generate(**audio, **drafts, **options).passes <= 3


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_a_sliding_window_counts_no_rejected_token(tokenizers, features, mode):
    text = tiny_text_model(tokenizers.text, MistralConfig, MistralForCausalLM, sliding_window=4)
    model = with_end_bias(assemble(tokenizers, text=text), 2.0)  # noqa: F811
    audio, _ = hear(model, features)
    options = {"fusion_mode": mode, "max_new_tokens": 24}
    plain = model.generate(**audio, **prompt_batch(model), **options, use_cache=False)
    texts = [without_padding(model, ids) for ids in plain]
    for kind in KINDS:
        drafts = drafts_like(texts, kind, model.end_token_ids[0])
        assert torch.equal(model.generate(**audio, **prompt_batch(model), **drafts, **options), plain), kind


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_any_attention_gives_the_same_tokens(model, features, attention):  # noqa: F811
    audio, _ = hear(model, features)
    plain = model.generate(**audio, fusion_mode="causal")
    drafts = drafts_like([without_padding(model, ids) for ids in plain], "edited", model.end_token_ids[0])
    model = copy.deepcopy(model)
    model.language_model.set_attn_implementation(attention)
    assert torch.equal(model.generate(**audio, **drafts, fusion_mode="causal"), plain)
    assert model.language_model.config._attn_implementation == attention


def test_layers_that_cannot_forget_are_refused(model, features):  # noqa: F811
    model = copy.deepcopy(model)
    model.language_model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention.*do_sample"):
        model.generate(features)


def compiled_anywhere() -> dict:
    """Compiled passes on a CPU too: traced as they are for an accelerator, then run as they stand."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize(
    ("mode", "alignment", "sliding"), [("full", "ratio", True), ("causal", "copy", False)], ids=["sliding", "causal"]
)
def test_compiled_passes_write_the_same_and_are_compiled_once(tokenizers, features, mode, alignment, sliding):
    kind = {"config_class": MistralConfig, "model_class": MistralForCausalLM, "sliding_window": 4} if sliding else {}
    plain_model = assemble(tokenizers, text=tiny_text_model(tokenizers.text, **kind), alignment_prior=True)
    model = with_end_bias(aligned_by(plain_model, alignment))  # noqa: F811
    options = {"fusion_mode": mode, "return_dict_in_generate": True, "max_new_tokens": 24}
    torch._dynamo.utils.counters.clear()
    for hear_these, lengths in ((features, LENGTHS), (features.flip(0), (3, 7, 9)), (features * 0.5, (12, 1, 5))):
        audio, singles = hear(model, hear_these, lengths)
        plain = model.generate(**audio, **options)
        texts = [without_padding(model, ids) for ids in plain.sequences]
        for draft in ("empty", "edited", "the text", "of another"):
            drafts = drafts_like(texts, draft, model.end_token_ids[0])
            for batch in (audio, singles[0]):
                these = {name: value[: len(batch["state_lengths"])] for name, value in drafts.items()}
                output = model.generate(**batch, **these, **options, **compiled_anywhere())
                for ids, text in zip(output.sequences, texts, strict=False):
                    assert without_padding(model, ids) == text
    assert 4 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(COMPILED_WIDTHS)


def test_a_static_cache_without_compiling_and_with_a_prompt(model, features):  # noqa: F811
    audio, _ = hear(model, features)
    prompts = prompt_batch(model)
    for mode in ("full", "causal", "full"):  # what the last texts left in the cache is not seen
        plain = model.generate(**audio, **prompts, fusion_mode=mode)
        drafts = drafts_like([without_padding(model, ids) for ids in plain], "edited", model.end_token_ids[0])
        static = model.generate(**audio, **prompts, **drafts, fusion_mode=mode, cache_implementation="static")
        assert torch.equal(static, plain)
    options = prompts | drafts | compiled_anywhere()
    assert torch.equal(model.generate(**audio, **options, fusion_mode="full"), plain)


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_relaxed_acceptance_takes_what_is_likely_enough(model, features, mode):  # noqa: F811
    model = with_end_bias(model)
    audio, _ = hear(model, features)
    options = {"fusion_mode": mode, "return_dict_in_generate": True}
    plain = model.generate(**audio, **options)
    texts = [without_padding(model, ids) for ids in plain.sequences]
    drafts = drafts_like(texts, "edited", model.end_token_ids[0])
    strict = model.generate(**audio, **drafts, **options, draft_min_probability=1.0)
    assert torch.equal(strict.sequences, plain.sequences)
    second = []  # a draft of the likeliest start and then, of every clip, the second likeliest token
    for clip in range(len(texts)):
        own = {name: value[clip : clip + 1] for name, value in audio.items()}
        rows = model.text_rows(torch.tensor([[model.start_token_id]]), 1, own["hypothesis_ids"])
        logits = model(input_ids=torch.tensor([[model.start_token_id]]), fusion_mode=mode, **rows, **own).logits[0, -1]
        chances, tokens = logits.softmax(-1).topk(2)
        second.append((tokens[1].item(), chances[1].item()))
    draft = {"draft_ids": torch.tensor([[token] for token, _ in second])}
    for threshold in (min(chance for _, chance in second) * 0.99, max(chance for _, chance in second) * 1.01):
        relaxed = model.generate(**audio, **draft, **options, draft_min_probability=threshold)
        for clip, (token, chance) in enumerate(second):
            taken = chance >= threshold and token not in model.end_token_ids
            assert relaxed.sequences[clip, 0] == (token if taken else texts[clip][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_min_probability": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"draft_min_probability": 0.2, "repetition_penalty": 1.8}, "RepetitionPenaltyLogitsProcessor.*leave out one"),
    ],
)
def test_relaxed_acceptance_has_its_bounds(model, features, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.generate(features, **options)


def test_other_processors_of_the_logits_see_the_text_so_far(model, features):  # noqa: F811
    audio, _ = hear(model, features)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
    options = {"fusion_mode": "causal", "logits_processor": processors, "max_new_tokens": 24}
    plain = model.generate(**audio, **options)
    drafts = drafts_like([without_padding(model, ids) for ids in plain], "edited", model.end_token_ids[0])
    assert torch.equal(model.generate(**audio, **drafts, **options), plain)
    assert not torch.equal(model.generate(**audio, fusion_mode="causal", max_new_tokens=24), plain)


def test_the_way_back_after_a_disagreement():
    words = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    ids = [token for word in words for token in word]
    starts = [index == 0 for word in words for index in range(len(word))]

    def after(*tokens: int) -> list[int]:
        draft = Draft(ids, starts)
        for token in tokens:
            draft.follow(token)
        return draft.offer(64)

    assert after() == ids
    assert after(1, 2, 3) == [4, 5, 6, 7, 8, 9]
    assert after(1, 2, 50) == [4, 5, 6, 7, 8, 9]  # another word for [3]
    assert after(1, 2, 50, 51, 4) == [5, 6, 7, 8, 9]  # of two tokens
    assert after(1, 2, 4) == [5, 6, 7, 8, 9]  # [3] is left out
    assert after(1, 2, 50, 3) == [4, 5, 6, 7, 8, 9]  # a word more
    assert after(1, 2, 3, 4, 50, 6) == [7, 8, 9]  # another middle of [4, 5, 6]


def test_drafts_are_offered_as_far_as_they_pay():
    def widths(clips: int, rows_a_pass: int, tokens: list[int]) -> list[int]:
        drafts = [Draft(list(range(100)), [True] * 100) for _ in range(clips)]
        batch, widths = [Clip([], [], draft, TextFollower(b"")) for draft in drafts], []
        for token in tokens:
            widths.append(offered_width(batch, [60] * clips, rows_a_pass))
            for draft in drafts:
                draft.follow(token)
        return widths

    right, wrong = widths(1, 512, list(range(20))), widths(1, 512, [-1] * 20)
    assert right == [60] * 20
    assert wrong == sorted(wrong, reverse=True) and wrong[0] == 60 and wrong[-1] <= 8
    few = widths(16, 32, list(range(20)))
    assert all(0 < narrow < wide for narrow, wide in zip(few, right, strict=True))
    assert widths(16, 32, [-1] * 20)[8:] == [0] * 12
    assert offered_width([Clip([], [], Draft([], []), TextFollower(b""))], [0], 512) == 0


@pytest.mark.parametrize("part", range(4))
def test_random_drafts_of_random_models_change_nothing(tokenizers, part):
    """FUZZ drafts in all (100; `FUZZ=1000 pytest tests/test_greedy.py -k random_drafts` for a long run)."""
    drafts = 0
    for seed in range(part, 10**6, 4):
        rng = random.Random(seed)
        alignment = rng.choice(["ratio", "text", "copy"])
        kind = {
            "config_class": MistralConfig,
            "model_class": MistralForCausalLM,
            "sliding_window": rng.randrange(3, 9),
        }
        torch.manual_seed(seed)
        model = assemble(  # noqa: F811
            tokenizers,
            text=tiny_text_model(tokenizers.text, **(kind if rng.random() < 0.3 else {})),
            seed=seed,
            injection_layers=rng.choice([[1], [2, 3]]),
            alignment="ratio" if alignment == "ratio" else "text",
            copy_hypothesis=alignment == "copy",
            copy_bias=rng.uniform(0, 2) if alignment == "copy" else 0.0,
            alignment_prior=rng.random() < 0.5,
            alignment_lookahead=rng.randrange(4),
            fusion_mode=rng.choice(["full", "causal"]),
        )
        model = with_end_bias(model, rng.uniform(0, 4))
        audio, singles = hear(model, torch.randn(3, 80, 100), [rng.randrange(13) for _ in range(3)])
        prompts = prompt_batch(model) if rng.random() < 0.5 else {}
        plain = model.generate(**audio, **prompts, max_new_tokens=24)
        texts = [without_padding(model, ids) for ids in plain]
        mixed = [drafts_like([ids], rng.choice(KINDS), model.end_token_ids[0], seed) for ids in texts]
        width = max(draft["draft_ids"].shape[1] for draft in mixed)
        rows = {
            name: torch.cat(
                [torch.nn.functional.pad(d[name], (0, width - d[name].shape[1]), value=fill) for d in mixed]
            )
            for name, fill in (("draft_ids", -1), ("draft_word_starts", False))
        }
        assert torch.equal(model.generate(**audio, **prompts, **rows, max_new_tokens=24), plain), seed
        clip = rng.randrange(3)
        prompt = {"input_ids": torch.tensor([PROMPTS[clip]])} if prompts else {}
        alone = model.generate(**singles[clip], **prompt, **mixed[clip], max_new_tokens=24)
        assert without_padding(model, alone[0]) == texts[clip], seed
        drafts += 3
        if drafts >= int(os.environ.get("FUZZ", 100)) / 4:
            break
