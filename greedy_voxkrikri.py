"""Greedy decoding of the fused LLM, with a draft that makes it quick and changes nothing.

* Whisper's hypothesis, in the LLM's tokens, is a free *draft* of the text. One pass of the LLM reads a stretch of it
  and tells what it would write after every token. As far as both agree the draft is the text, and what the LLM writes
  at the first disagreement comes next: the tokens are plain greedy's, in fewer passes. Without a draft, or past it,
  this is plain greedy decoding. (Leviathan et al., 2023, with a draft of zero cost; the way back is `Draft`.)
* In causal mode the end may be written only by a row that sees the last state. A row that wants it earlier is dropped
  and fed again, and it and all later rows see one state more.
* The clips of a batch accept different numbers of tokens: `cache_voxkrikri.py` keeps every token at its own position.
* Compiled passes (`cache_implementation="static"`) have a few widths, so that nothing is compiled twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .alignment_voxkrikri import TextFollower, spell
from .cache_voxkrikri import SlotCache, attention_by_mask, room_for_graphs, slot_masks


LONGEST_OFFER = 63  # draft tokens of a clip in one pass
COMPILED_WIDTHS = (1, 4, 16, 64)  # tokens of a clip in a compiled pass: the last of its text, and offers
ROWS_A_PASS_ON_CPU, ROWS_A_PASS = 32, 200  # an accelerator computes some 200 rows while it reads the weights


@dataclass
class GreedyOutput(ModelOutput):
    """What `greedy_search` returns.

    Args:
        sequences: `(batch, prompt and tokens)`, padded after the end.
        token_logprobs: `(batch, tokens)` log-probability of every new token, 0 on padding.
        passes: how often the LLM ran.
        drafted, accepted: `(batch,)`, draft tokens that were verified, and those that were right.
    """

    sequences: torch.LongTensor | None = None
    token_logprobs: torch.FloatTensor | None = None
    passes: int | None = None
    drafted: torch.LongTensor | None = None
    accepted: torch.LongTensor | None = None


class Draft:
    """What the text will probably be. After a disagreement it finds its way back, never backwards:

    * the LLM's token stands a little further on: what lies between was left out;
    * else the LLM writes another word here: the draft is offered again from its next word on.

    Every token of the LLM tells whether the draft was right there, offered or not. How often lately, after a token where it
    was right and after one where it was not, are the chances by which `offered_width` decides.
    """

    REACH = 8  # tokens ahead in which a token of the LLM is looked for
    AFTER_RIGHT, AFTER_WRONG = (4.9, 0.1), (0.3, 0.7)  # right and wrong, already counted before the first one
    MEMORY = 0.9  # what a token counts, once for every later one

    def __init__(self, ids: list[int], word_starts: list[bool]):
        self.ids, self.word_starts = ids, word_starts
        self.reached = self.next = 0  # what the text has covered, and what is offered next
        self.counts = {True: self.AFTER_RIGHT, False: self.AFTER_WRONG}
        self.was_right = True

    @property
    def chances(self) -> tuple[float, float]:
        """That the next token is right, and that one after a right token is."""
        shares = {state: right / (right + wrong) for state, (right, wrong) in self.counts.items()}
        return shares[self.was_right], min(shares[True], 0.999)

    def offer(self, width: int) -> list[int]:
        return self.ids[self.next : self.next + width]

    def follow(self, token: int) -> None:
        """The text goes on with `token`."""
        if self.next < len(self.ids):
            is_right = self.ids[self.next] == token
            right, wrong = self.counts[self.was_right]
            self.counts[self.was_right] = self.MEMORY * right + is_right, self.MEMORY * wrong + (not is_right)
            self.was_right = is_right
        ahead = self.ids[self.reached : self.reached + self.REACH]
        if self.next < len(self.ids) and self.ids[self.next] == token:
            self.reached = self.next = self.next + 1
        elif token in ahead:
            self.reached = self.next = self.reached + ahead.index(token) + 1
        elif self.next == self.reached:
            self.next += 1
            while self.next < len(self.ids) and not self.word_starts[self.next]:
                self.next += 1


@dataclass
class Clip:
    """One clip of the batch while it is written."""

    prompt: list[int]
    prompt_positions: list[int]  # -1 on padding
    draft: Draft
    follower: TextFollower
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # States that each row of the text sees beyond its alignment; the last row has written nothing yet.
    waits: list[int] = field(default_factory=lambda: [0])
    reached: list[int] = field(default_factory=lambda: [0])  # bytes of the hypothesis that each row's text stands for
    finished: bool = False
    drafted: int = 0
    accepted: int = 0

    def columns(self, offer: list[int], pieces: list[bytes]) -> dict[str, list[int]]:
        """What the LLM is fed for prompt, text and offered draft: row t is the column before token t."""
        text = self.tokens + offer
        before = len(self.prompt) - 1  # columns that predict nothing
        first = self.prompt_positions[-1] + 1
        follower = self.follower.copy()
        return {
            "input_ids": self.prompt + text,
            "position_ids": self.prompt_positions + list(range(first, first + len(text))),
            "text_positions": [-1] * before + list(range(len(text) + 1)),
            "text_reached": [0] * before + self.reached + [follower.read(pieces[token]) for token in offer],
            "state_waits": [0] * before + self.waits + [self.waits[-1]] * len(offer),
        }


def offered_width(clips: list[Clip], longest: list[int], rows_a_pass: int, widths: Sequence[int] | None = None) -> int:
    """How many draft tokens of every clip one pass verifies: most text for its cost, 1 + rows / `rows_a_pass`.

    A draft that is right with chance q, and with p after a right token, gives q (1 + p + ... + p^(w-1)) tokens. Where
    rows are dear (a batch on a CPU) or drafts are poor, few are offered or none, and decoding takes no longer than
    without.

    Args:
        longest: tokens that every clip's draft still has room for.
        rows_a_pass: rows whose computing costs as much as the pass itself, such as reading the weights.
        widths: what to choose from; as many as there is room for if left out.
    """
    first, later = np.array([clip.draft.chances for clip in clips]).T[..., None]
    widths = np.arange(min(max(longest), LONGEST_OFFER) + 1) if widths is None else np.array(widths)
    likely = first * (1 - later ** np.minimum(widths, np.array(longest)[:, None])) / (1 - later)
    return int(widths[np.argmax((len(clips) + likely.sum(0)) / (1 + len(clips) * (1 + widths) / rows_a_pass))])


PADDING = {"input_ids": 0, "position_ids": -1, "text_positions": -1, "text_reached": 0, "state_waits": 0}


def greedy_search(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    draft_ids: torch.LongTensor | None = None,
    draft_word_starts: torch.BoolTensor | None = None,
    draft_min_probability: float | None = None,
    static_cache: bool = False,
    **model_kwargs,
) -> GreedyOutput:
    """transformers' `custom_generate` for VoxKrikri: see above.

    Args:
        draft_ids: `(batch, n)`, the draft and its end, padded with -1.
        draft_word_starts: `(batch, n)`, the draft's tokens that begin a word.
        draft_min_probability: relaxed acceptance: a draft token is taken where the LLM gives it this probability, though
            another may be likelier. The text is then not greedy decoding's any more.
        static_cache: keep the cache for the next batch of this size and, on an accelerator, compile the passes.

    Raises:
        ValueError: for a streamer beside a batch, whose clips do not grow in step; for a draft_min_probability that is
            none, or beside logits processors, which judge one token after the other.
    """
    if draft_min_probability is not None:
        if not 0 < draft_min_probability <= 1:
            raise ValueError(f"draft_min_probability must be above 0 and at most 1, got {draft_min_probability}")
        if logits_processor:
            names = ", ".join(type(processor).__name__ for processor in logits_processor)
            raise ValueError(f"draft_min_probability cannot be used beside logits processors ({names}): leave out one")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one clip at a time, got {len(input_ids)}")
    device, prompt_length = input_ids.device, model_kwargs.pop("prompt_length")
    prompt_mask = model_kwargs.pop("attention_mask")
    if prompt_mask is None:  # transformers drops one without padding
        prompt_mask = torch.ones_like(input_ids)
    audio = {name: model_kwargs.pop(name, None) for name in model.ALIGNMENT_INPUTS}
    keep = {name: model_kwargs.pop(name, None) for name in ("audio_keys", "audio_values", "fusion_mode")}
    lookahead, copy_bias = model_kwargs.pop("alignment_lookahead", None), model_kwargs.pop("copy_bias", 0.0)
    end_ids, pieces = set(model.end_token_ids), model.text_pieces
    hypotheses = [b""] * len(input_ids)
    if model.config.alignment == "text" and audio["hypothesis_ids"] is not None:
        hypotheses = [spell(rows) for rows in model.speech_bytes[audio["hypothesis_ids"]].cpu().numpy()]
    most = stopping_criteria.max_length - prompt_length  # tokens of a text
    stop_ids = end_ids.union(
        *(c.eos_token_id.flatten().tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria))
    )
    further = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
    clips = []
    for row, (prompt, prompt_row) in enumerate(zip(input_ids.tolist(), prompt_mask.tolist(), strict=True)):
        ids = [] if draft_ids is None else [token for token in draft_ids[row].tolist() if token >= 0]
        starts = [True] * len(ids) if draft_word_starts is None else draft_word_starts[row].tolist()
        places = (np.cumsum(prompt_row) * prompt_row - 1).tolist()
        clips.append(Clip(prompt, places, Draft(ids, starts), TextFollower(hypotheses[row])))

    cache = compiled = None
    if generation_config.use_cache:
        cache = static_cache_of(model, len(clips), stopping_criteria.max_length) if static_cache else SlotCache()
    if static_cache and model._valid_auto_compile_criteria({"past_key_values": cache}, generation_config):
        # Hooks, by which accelerate spreads an LLM over devices, cut the graph.
        hooked = any(hasattr(module, "_hf_hook") for module in model.language_model.modules())
        compile_config = generation_config.compile_config or CompileConfig(fullgraph=not hooked)
        compiled = model.language_model.get_compiled_call(replace(compile_config, dynamic=False))
        states = model.config.speech_config.max_target_positions  # as many for all clips
        for name in ("audio_keys", "audio_values"):
            keep[name] = nn.functional.pad(keep[name], (0, 0, 0, max(states - keep[name].shape[-2], 0)))
    text_config = model.language_model.config.get_text_config()
    rows_a_pass = ROWS_A_PASS_ON_CPU if device.type == "cpu" else ROWS_A_PASS
    passes = 0
    while not all(clip.finished for clip in clips):
        room = [0 if clip.finished else most - len(clip.tokens) - 1 for clip in clips]
        longest = [min(len(clip.draft.offer(LONGEST_OFFER)), left) for clip, left in zip(clips, room, strict=True)]
        compiles = compiled is not None and (passes > 0 or prompt_length == 1)  # the block has one width of the few
        widths = [width - 1 for width in COMPILED_WIDTHS] if compiles else None
        offered = offered_width(clips, longest, rows_a_pass, widths)
        offers = [clip.draft.offer(min(offered, left)) for clip, left in zip(clips, longest, strict=True)]
        columns = [clip.columns(offer, pieces) for clip, offer in zip(clips, offers, strict=True)]
        if cache is not None and passes:  # all but the last token of the text is in the cache
            columns = [
                {name: values[-1 - len(offer) :] for name, values in column.items()}
                for column, offer in zip(columns, offers, strict=True)
            ]
        # The last tokens of all texts stand in one column, offers right of it, the rest left of it.
        last = max(len(column["input_ids"]) - len(offer) for column, offer in zip(columns, offers, strict=True)) - 1
        width = last + 1 + (offered if compiles else max(map(len, offers)))
        block = {name: torch.full((len(clips), width), padding) for name, padding in PADDING.items()}
        for row, (column, offer) in enumerate(zip(columns, offers, strict=True)):
            stop = last + 1 + len(offer)
            for name, values in column.items():
                block[name][row, stop - len(values) : stop] = torch.tensor(values)
        furthest = int(block["position_ids"].max())
        block = {name: values.to(device) for name, values in block.items()}
        positions = block.pop("position_ids")
        if cache is None:
            attention_mask = (positions >= 0).long()
        else:
            cache.place(positions, furthest)
            attention_mask = slot_masks(text_config, positions, cache.length)
        with attention_by_mask(model.language_model), room_for_graphs(static_cache):
            logits = model(
                **block,
                attention_mask=attention_mask,
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=width - last,
                alignment_lookahead=lookahead,
                copy_bias=copy_bias,
                language_model=compiled if compiles and cache.keys else None,
                **audio,
                **keep,
            ).logits.to(device, torch.float32)
        passes += 1
        may_end = torch.ones(logits.shape[:2], dtype=torch.bool)
        if keep["fusion_mode"] == "causal":
            rows = {name: block[name][:, last:] for name in ("text_positions", "text_reached", "state_waits")}
            may_end = model.sees_last_state(alignment_lookahead=lookahead, **rows, **audio)
        may_end = may_end.tolist()
        if not logits_processor:
            logprobs = logits.log_softmax(-1)
            best, tokens = logprobs.max(-1)
            if draft_min_probability is not None:
                drafted = block["input_ids"][:, last + 1 :]
                chances = logprobs[:, :-1].gather(-1, drafted[..., None]).squeeze(-1)
                likely = (chances >= math.log(draft_min_probability)) & (positions[:, last + 1 :] >= 0)
                tokens[:, :-1] = torch.where(likely, drafted, tokens[:, :-1])
                best[:, :-1] = torch.where(likely, chances, best[:, :-1])
            logprobs, tokens = best.tolist(), tokens.tolist()

        for row, (clip, offer) in enumerate(zip(clips, offers, strict=True)):
            column = 0  # from the last token on
            while not clip.finished:
                if logits_processor:
                    text = torch.tensor([clip.prompt + clip.tokens], device=device)
                    scores = logits_processor(text, logits[row : row + 1, column]).log_softmax(-1)
                    logprob, token = scores[0].max().item(), scores[0].argmax().item()
                else:
                    logprob, token = logprobs[row][column], tokens[row][column]
                if token in end_ids and not may_end[row][column]:
                    clip.waits[-1] += 1
                    break
                clip.tokens.append(token)
                clip.logprobs.append(logprob)
                clip.waits.append(clip.waits[-1])
                clip.reached.append(clip.follower.read(pieces[token]))
                clip.draft.follow(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
                clip.finished = token in stop_ids or len(clip.tokens) >= most
                if further and not clip.finished:
                    text = torch.tensor([clip.prompt + clip.tokens], device=device)
                    clip.finished = any(bool(criterion(text, None)) for criterion in further)
                if column == len(offer) or offer[column] != token:
                    break
                column += 1
            clip.drafted += len(offer)
            clip.accepted += column
    if streamer is not None:
        streamer.end()

    pad_id = model.end_token_ids[0] if generation_config.pad_token_id is None else generation_config.pad_token_id
    texts = [torch.tensor(clip.tokens, device=device) for clip in clips]
    logprobs = [torch.tensor(clip.logprobs, device=device) for clip in clips]
    return GreedyOutput(
        sequences=torch.cat([input_ids, pad_sequence(texts, batch_first=True, padding_value=pad_id)], dim=-1),
        token_logprobs=pad_sequence(logprobs, batch_first=True),
        passes=passes,
        drafted=torch.tensor([clip.drafted for clip in clips]),
        accepted=torch.tensor([clip.accepted for clip in clips]),
    )


def static_cache_of(model, batch: int, longest: int) -> SlotCache:
    """The model's static cache for `batch` texts of up to `longest` tokens: the last one, where it fits."""
    key = batch, -(-(longest + 1) // 64) * 64, model.device, model.dtype
    if getattr(model, "_static_cache", (None,))[0] != key:
        model._static_cache = key, SlotCache(static_slots=key[1])
    return model._static_cache[1]
