"""Where in the hypothesis each row of the text stands, and which states it sees (Eqs. 3-4)."""

import re
from functools import cached_property

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


LONGEST_PIECE = 32  # bytes kept of a token


def aligned_states(
    text_positions: torch.LongTensor,
    state_lengths: torch.LongTensor,
    token_counts: torch.LongTensor | None,
    states_per_token: float,
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """Ratio alignment (Eq. 3): row t lies at state floor(S/T t), by integer arithmetic.

    Args:
        text_positions: `(batch, rows)`, t.
        state_lengths: `(batch,)`, S.
        token_counts: `(batch,)`, T, or None: S/T is `states_per_token`, to three decimals.

    Returns:
        The state index and, unrounded, the centre (t + 1/2) S/T of the row's span, each `(batch, rows)`.
    """
    if token_counts is None:
        states, tokens = torch.full_like(state_lengths, round(1000 * states_per_token)), 1000
    else:
        states, tokens = state_lengths, token_counts[:, None]
    return (states[:, None] * text_positions) // tokens, (text_positions + 0.5) * states[:, None] / tokens


def text_aligned_states(
    text_reached: torch.LongTensor, state_starts: torch.LongTensor, state_lengths: torch.LongTensor
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """Text alignment: the last hypothesis token that starts at or before the byte that the text has reached.

    Args:
        text_reached: `(batch, rows)`, bytes of the hypothesis that the text before each row's token stands for.
        state_starts: `(batch, states)`, the first byte of each hypothesis token, then of the end.
        state_lengths: `(batch,)`, S: what lies behind is padding.

    Returns:
        The state index, and the same as the centre of the row's span, each `(batch, rows)`.
    """
    index = torch.searchsorted(state_starts, text_reached.contiguous(), right=True) - 1
    index = torch.minimum(index, state_lengths[:, None] - 1)
    return index, index.float()


def alignment_mask(
    text_positions: torch.LongTensor,
    last_visible: torch.LongTensor,
    num_states: int,
) -> torch.BoolTensor:
    """Which states each row sees, `(batch, rows, states)`: M_{t,s} is 0 where True and minus infinity elsewhere (Eq. 4).

    A row outside the text (t = -1) may look at state 0, since a softmax over nothing is NaN; its result is dropped.
    """
    last_visible = torch.where(text_positions < 0, 0, last_visible)
    return torch.arange(num_states, device=last_visible.device) <= last_visible[..., None]


class TextFollower:
    """Finds the place in the hypothesis where a text stands that grows piece by piece.

    It is the end of that prefix of the hypothesis which has the smallest edit distance (Levenshtein's) to the text so
    far; the last of several. So the two run together again after a word that is longer in one than in the other, where a
    count of what was written would stay beside it. Only bytes less than AHEAD beyond the last place are looked at: a
    stream knows no more.
    """

    AHEAD = 16

    def __init__(self, hypothesis: bytes):
        self.hypothesis = np.frombuffer(hypothesis, dtype=np.uint8)
        self.lengths = np.arange(len(hypothesis) + 1)
        self.distances = self.lengths  # of every prefix to the text
        self.reached = 0

    def copy(self) -> "TextFollower":
        twin = object.__new__(TextFollower)
        twin.__dict__ |= self.__dict__  # arrays are replaced, never changed
        return twin

    def read(self, piece: bytes) -> int:
        """Takes the text's next bytes and returns how many of the hypothesis's they lead up to."""
        for byte in piece:
            distances = self.distances + 1
            np.minimum(distances[1:], self.distances[:-1] + (self.hypothesis != byte), out=distances[1:])
            self.distances = np.minimum.accumulate(distances - self.lengths) + self.lengths
            near = self.distances[: self.reached + self.AHEAD]
            self.reached = len(near) - 1 - int(near[::-1].argmin())
        return self.reached


def next_tokens(hypothesis: bytes, reached: list[int], stops: list[int], vocabulary: dict[bytes, int]) -> list[int]:
    """For every row the longest token that the hypothesis goes on with at `reached`, within `stops` bytes; else -1."""
    tokens = []
    for first, stop in zip(reached, stops, strict=True):
        lengths = range(min(stop - first, LONGEST_PIECE), 0, -1)
        found = (vocabulary.get(hypothesis[first : first + length]) for length in lengths)
        tokens.append(next((token for token in found if token is not None), -1))
    return tokens


def spell(pieces: np.ndarray) -> bytes:
    """The text of tokens, from their rows of `token_bytes`."""
    return pieces.tobytes().replace(b"\0", b"")


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """The first bytes of what each token writes, `(vocab_size, LONGEST_PIECE)` uint8, padded with 0; none for special tokens."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]  # some decoders drop a space before the first word
    anchor_length = len(tokenizer.decode([anchor]))
    special = set(tokenizer.all_special_ids)
    table = np.zeros((vocab_size, LONGEST_PIECE), dtype=np.uint8)
    for token in range(min(len(tokenizer), vocab_size)):
        if token in special:
            continue
        text = tokenizer.decode([anchor, token])[anchor_length:]
        data = text.encode()
        if "\ufffd" in text:  # part of a character: "<0xCE>" in SentencePiece, else one letter a byte
            piece = tokenizer.convert_ids_to_tokens(token)
            single = re.fullmatch("<0x([0-9A-F]{2})>", piece)
            data = bytes(
                [int(single[1], 16)] if single else [byte_of[letter] for letter in piece if letter in byte_of]
            )
        data = data.replace(b"\0", b"")[:LONGEST_PIECE]
        table[token, : len(data)] = np.frombuffer(data, dtype=np.uint8)
    return torch.from_numpy(table)


class VoxKrikriAlignmentMixin:
    """Alignment of VoxKrikriForConditionalGeneration, which owns `config`, `speech_bytes` and `text_bytes`."""

    def follow_hypothesis(
        self,
        input_ids: torch.LongTensor,
        text_positions: torch.LongTensor,
        hypothesis_ids: torch.LongTensor | None,
    ) -> torch.LongTensor:
        """How many bytes of the hypothesis the text before each row's token stands for, `(batch, rows)`.

        `input_ids` hold the text from its beginning; 0 where the configuration's alignment does not ask.
        """
        reached = torch.zeros(text_positions.shape, dtype=torch.long)
        if self.config.alignment == "text" and hypothesis_ids is not None:
            pieces = self.text_bytes[input_ids].cpu().numpy()
            hypotheses = self.speech_bytes[hypothesis_ids].cpu().numpy()
            for clip, positions in enumerate(text_positions.tolist()):
                follower = TextFollower(spell(hypotheses[clip]))
                for row, t in enumerate(positions):
                    if t > 0:
                        reached[clip, row] = follower.read(spell(pieces[clip, row]))
        return reached.to(text_positions.device)

    def _state_starts(self, hypothesis_ids: torch.LongTensor) -> torch.LongTensor:
        """The first byte of each hypothesis token, then of the end, `(batch, n + 1)`."""
        lengths = (self.speech_bytes[hypothesis_ids] != 0).sum(-1)
        return nn.functional.pad(lengths.cumsum(-1), (1, 0))

    def align(
        self,
        text_positions: torch.LongTensor,
        state_lengths: torch.LongTensor,
        text_reached: torch.LongTensor | None = None,
        hypothesis_ids: torch.LongTensor | None = None,
        hypothesis_token_counts: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """State index and centre of every row, `(batch, rows)`, by the configuration's alignment."""
        if self.config.alignment == "text":
            if text_reached is None or hypothesis_ids is None:
                raise ValueError('alignment="text" needs the hypothesis: give hypothesis_ids beside audio_states')
            return text_aligned_states(text_reached, self._state_starts(hypothesis_ids), state_lengths)
        return aligned_states(text_positions, state_lengths, hypothesis_token_counts, self.config.states_per_token)

    @cached_property
    def text_pieces(self) -> list[bytes]:
        """What every token of the LLM writes."""
        return list(map(spell, self.text_bytes.cpu().numpy()))

    @cached_property
    def _vocabulary(self) -> dict[bytes, int]:
        """The LLM's token of every piece of text."""
        return {piece: token for token, piece in enumerate(self.text_pieces) if piece}

    def copied_tokens(
        self,
        text_reached: torch.LongTensor,
        last_visible: torch.LongTensor,
        hypothesis_ids: torch.LongTensor,
        state_lengths: torch.LongTensor,
    ) -> torch.LongTensor:
        """The LLM's token that the hypothesis goes on with at each row, `(batch, rows)`.

        It is the longest that the visible states wrote, the LLM's end behind the last of them, and -1 where none fits.
        """
        spelt, starts = self.speech_bytes[hypothesis_ids].cpu().numpy(), self._state_starts(hypothesis_ids)
        stops = starts.gather(1, (last_visible + 1).clamp(max=starts.shape[1] - 1))
        rows = zip(map(spell, spelt), text_reached.tolist(), stops.tolist(), strict=True)
        tokens = torch.tensor([next_tokens(*row, self._vocabulary) for row in rows], device=stops.device)
        ended = (last_visible == state_lengths[:, None] - 1) & (text_reached >= stops)
        return tokens.masked_fill(ended, self.end_token_ids[0])

    def last_visible_state(
        self,
        aligned: torch.LongTensor,
        state_lengths: torch.LongTensor,
        fusion_mode: str,
        alignment_lookahead: int | None = None,
        state_waits: torch.LongTensor | int = 0,
    ) -> torch.LongTensor:
        """s_t, the last state each row sees, `(batch, rows)`: S - 1 in full mode, else at most aligned + k + waits."""
        last = (state_lengths[:, None] - 1).expand_as(aligned)
        if fusion_mode == "full":
            return last
        lookahead = self.config.alignment_lookahead if alignment_lookahead is None else alignment_lookahead
        return torch.minimum(aligned + lookahead + state_waits, last)

    def sees_last_state(
        self,
        text_positions: torch.LongTensor,
        state_lengths: torch.LongTensor,
        alignment_lookahead: int | None = None,
        state_waits: torch.LongTensor | int = 0,
        **alignment,
    ) -> torch.BoolTensor:
        """Whether a causal row sees all of the hypothesis, `(batch, rows)`: only then may it end the text."""
        aligned, _ = self.align(text_positions, state_lengths, **alignment)
        visible = self.last_visible_state(aligned, state_lengths, "causal", alignment_lookahead, state_waits)
        return visible == state_lengths[:, None] - 1
