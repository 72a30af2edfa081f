"""Where the LLM's keys and values lie while the texts of a batch grow unevenly: every token at the slot of its position.

* A token at position p of its row is written to slot p + 1. A rejected draft token is overwritten by what comes instead:
  nothing is cropped or moved, and a row sees the slots up to its own position, in an LLM with a sliding window too.
* Slot 0 takes the padding, which no token sees.
* A *static* cache has all its slots from the start: its shapes and addresses stay, as compiled passes need it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, PretrainedConfig, PreTrainedModel


MOST_GRAPHS = 64


class SlotCache(Cache):
    """Keys and values of every layer, `(batch, heads, slots, head size)`.

    Args:
        static_slots: how many slots it has from the start; None: as many as are in use.
    """

    is_compileable = True  # transformers asks

    def __init__(self, static_slots: int | None = None):
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.static_slots = static_slots
        self.length = static_slots or 0  # slots that attention looks at
        self.slots = None  # (batch, rows), of the pass that is to come

    def place(self, positions: torch.LongTensor, furthest: int) -> None:
        """The next pass is of tokens at `positions`, `(batch, rows)`, -1 on padding, the last of them at `furthest`."""
        self.slots = positions + 1
        if self.static_slots is None:
            self.length = max(self.length, furthest + 2)
            room = self.keys[0].shape[2] if self.keys else self.length
            if self.length > room:
                more = max(self.length, 2 * room) - room
                self.keys = [nn.functional.pad(keys, (0, 0, 0, more)) for keys in self.keys]
                self.values = [nn.functional.pad(values, (0, 0, 0, more)) for values in self.values]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots[:, None, :, None].to(key_states.device)
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            if len(kept) <= layer_idx:
                kept.append(states.new_zeros(*states.shape[:2], self.length, states.shape[-1]))
                if self.static_slots is not None:
                    torch._dynamo.mark_static_address(kept[layer_idx])
            kept[layer_idx].scatter_(2, slots.expand_as(states), states)
        return self.keys[layer_idx][:, :, : self.length], self.values[layer_idx][:, :, : self.length]


def slot_masks(
    config: PretrainedConfig, positions: torch.LongTensor, num_slots: int
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Which slots tokens at `positions` see, `(batch, 1, rows, slots)`, as the LLM of this configuration takes it.

    One for all layers or, by their kind, a dict; True and False, or 0 and the least number for eager attention. Padding
    sees slot 0, since a softmax over nothing is NaN.

    Raises:
        ValueError: for layers that keep something else than keys and values, and cannot forget a rejected token.
    """
    kept = torch.arange(num_slots, device=positions.device) - 1  # the position in every slot
    positions = positions[:, None, :, None]
    age = positions - kept
    masks = {"full_attention": (age >= 0) & ((kept >= 0) | (positions < 0))}
    window = getattr(config, "sliding_window", None)
    if window is not None:
        masks["sliding_attention"] = masks["full_attention"] & (age < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - masks.keys():
        raise ValueError(
            f"greedy decoding needs layers of full or sliding attention, this LLM has {sorted(kinds - masks.keys())}: "
            "choose another, or decode with do_sample or num_beams"
        )
    if config._attn_implementation == "eager":
        least = torch.finfo(torch.float32).min
        masks = {
            kind: torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, least) for kind, mask in masks.items()
        }
    if kinds:
        return {kind: masks[kind] for kind in kinds}
    return masks["full_attention" if window is None else "sliding_attention"]


@contextmanager
def attention_by_mask(language_model: PreTrainedModel) -> Iterator[None]:
    """Flash and flex attention cannot read such masks: PyTorch's own does their work meanwhile."""
    usual = language_model.config._attn_implementation
    if usual in ("eager", "sdpa"):
        yield
        return
    language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language_model.set_attn_implementation(usual)


@contextmanager
def room_for_graphs(static: bool) -> Iterator[None]:
    """With static caches, room for a graph of each width and size of a batch, of Whisper and of the LLM.

    All of them count as one for PyTorch, since transformers wraps every forward in the same function.
    """
    if not static:
        yield
        return
    with torch._dynamo.config.patch(cache_size_limit=MOST_GRAPHS):
        yield
