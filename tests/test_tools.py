import pytest

from tools.parameters import paper_config, table
from training.plan import count_parameters


def test_parameters_of_the_papers_model():
    counts, trained = count_parameters(paper_config())
    backbones = counts.total() - counts["LoRA"] - counts["fusion"]
    assert round(backbones / 1e9, 3) == 9.746
    assert counts["the LLM's head"] == 149_248 * 4096 == 611_319_808
    assert counts["LoRA"] == 20_971_520
    assert counts["fusion"] == 4096 * 4096 + 2 * 1280 * 4096 == 27_262_976
    assert trained.total() == counts["LoRA"] + counts["fusion"]
    lines = table(counts).splitlines()
    assert lines[-2].endswith("unexplained 695.8 M")
    assert lines[-1].endswith("unexplained 84.4 M")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_count_a_tied_head_once(tied):
    config = paper_config()
    config.text_config.tie_word_embeddings = tied
    assert count_parameters(config)[0]["the LLM's head"] == (0 if tied else 149_248 * 4096)
