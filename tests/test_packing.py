"""Packed sequences give what separate sequences give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import GRID, tiny_model, tiny_processor

from collavo.model.packing import PADDING, SHARED, packed_positions, packing_mask
from collavo.training.batches import Example, collate, pack_prompts

QUESTIONS = [
    [("human", "How many people are there in the image?"), ("gpt", "There are 2 people.")],
    [("human", "Is there a car in the image?"), ("gpt", "No.")],
    [("human", "List everything in this image by name and number."), ("gpt", "Sure, it is (#1 person), (#2 person).")],
]


def example(turns: list, seed: int = 0) -> Example:
    processor = tiny_processor()
    input_ids, labels, sequence_ids = pack_prompts([processor.render(t) for t in turns], processor.image_token_id)
    generator = torch.Generator().manual_seed(seed)
    return Example(
        kind="crayon",
        image_id="a",
        input_ids=input_ids,
        labels=labels,
        sequence_ids=sequence_ids,
        pixel_values=torch.randn(3, 14 * GRID, 14 * GRID, generator=generator),
        semantic_ids=torch.randint(0, 134, (GRID, GRID), generator=generator),
        numbering_ids=torch.randint(0, 21, (GRID, GRID), generator=generator),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_of_a_packed_sequence_are_those_of_its_instructions_apart(attention: str) -> None:
    packed = [collate([example(QUESTIONS), example(QUESTIONS[:1])], pad_token_id=2)]
    apart = [collate([example([turns])], pad_token_id=2) for turns in [*QUESTIONS, QUESTIONS[0]]]
    assert packed[0].supervised_tokens == sum(piece.supervised_tokens for piece in apart)
    losses, gradients = [], []
    for pieces in (packed, apart):
        model = tiny_model()
        model.set_attn_implementation(attention)
        loss = sum(model(**piece.inputs, supervised_only=True, num_items_in_batch=1).loss for piece in pieces)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("turns", "masks"), [(QUESTIONS, 1), (QUESTIONS[:1], 0)], ids=["packed", "padded"])
def test_layers_keep_no_mask_of_their_own_for_the_backward_pass(turns: list, masks: int) -> None:
    inputs = collate([example(turns), example([[("human", "Well?"), ("gpt", "No.")]])], pad_token_id=2).inputs
    tokens, model, kept = inputs["input_ids"].shape[1], tiny_model(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (tokens, tokens):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs, supervised_only=True)
    assert len(kept) == masks


def test_an_implementation_that_cannot_keep_sequences_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attention_2"):
        packing_mask(torch.zeros(1, 4, dtype=torch.long), "flash_attention_2", torch.float32)


@given(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4), st.integers(0, 3))
def test_positions_of_every_instruction_go_on_from_the_shared_part(shared: int, lengths: list[int], pad: int) -> None:
    ids = [SHARED] * shared
    expected = list(range(shared))
    for number, length in enumerate(lengths, start=1):
        ids += [number] * length
        expected += range(shared, shared + length)
    positions = packed_positions(torch.tensor([ids + [PADDING] * pad]))
    assert positions[0].tolist() == expected + [0] * pad


@given(st.lists(st.sampled_from([PADDING, SHARED, 1, 2, 3]), min_size=1, max_size=8))
def test_the_mask_shows_a_token_the_shared_part_and_its_own_past(ids: list[int]) -> None:
    mask = packing_mask(torch.tensor([ids]), "sdpa", torch.float32)[0, 0]
    for query, of_query in enumerate(ids):
        for key, of_key in enumerate(ids):
            sees = key <= query and of_key != PADDING and of_key in (SHARED, of_query)
            assert bool(mask[query, key] == 0) == (sees or key == query)
