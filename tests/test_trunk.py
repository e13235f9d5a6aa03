"""test_trunk.py: a forward pass in two parts is the forward pass, and a prompt that is asked often is read once."""
import pytest
import torch

from data.runtime.files import UserError
from model import generate, glm_position_ids
from test_model import ANY, ids, make, pad, soft

TOKENS = pad(ids(9, 6, 4))
LENGTHS = torch.tensor([9, 6, 4])


def in_two_parts(model, k, past=None, select=None, **view):
    trunk, below = model.hidden_states(TOKENS, past, stop_layer=k, **view)
    hidden, above = model.hidden_states(trunk, past, start_layer=k, select=select, **view)
    return hidden, below + above


VIEWS = {
    "causal": {},
    "prefix": dict(bidirectional_len=LENGTHS - 2),
    "glm": dict(glm_positions=glm_position_ids(torch.arange(9), LENGTHS - 1)),
    "checkpointing": dict(gradient_checkpointing=True),
}


@ANY
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("P", [0, 3])
def test_two_parts_are_the_whole_to_the_bit(kind, view, P):
    model = make(kind, n_layer=3)
    past = soft(model, P) if P else None
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([8, 2, 3])
    for k in range(4):
        whole, made = model.hidden_states(TOKENS, past, **VIEWS[view])
        parts, also_made = in_two_parts(model, k, past, **VIEWS[view])
        assert torch.equal(parts, whole)
        assert all(torch.equal(x, y) for one, other in zip(made, also_made, strict=True) for x, y in zip(one[:2], other))
        if k < 3:
            some, _ = in_two_parts(model, k, past, (rows, columns), **VIEWS[view])
            assert torch.allclose(some, whole[rows, columns], atol=1e-5)


@ANY
def test_gradients_of_the_upper_part(kind):
    model = make(kind, n_layer=3)
    weight = model.blocks[2].mlp.up.weight
    model.hidden_states(TOKENS)[0].square().sum().backward()
    expected = weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        trunk, _ = model.hidden_states(TOKENS, stop_layer=2)
    model.hidden_states(trunk, start_layer=2)[0].square().sum().backward()
    assert torch.equal(weight.grad, expected) and model.blocks[1].mlp.up.weight.grad is None


def test_a_soft_prompt_of_the_upper_blocks_alone():
    model = make("llama", n_layer=3)
    past = [None, None, soft(model, 3)[2]]
    whole, _ = model.hidden_states(TOKENS, past)
    assert torch.equal(in_two_parts(model, 2, past)[0], whole)


@pytest.mark.parametrize("call, says", [
    (dict(start_layer=4), "from 0 to 3"),
    (dict(start_layer=-1), "from 0 to 3"),
    (dict(stop_layer=1.5), "whole numbers"),
    (dict(start_layer=2, stop_layer=1), "in this order"),
    (dict(start_layer=1), "not token ids"),
    (dict(stop_layer=1, select=(torch.tensor([0]), torch.tensor([0]))), "select is for the last block"),
])
def test_what_cannot_be(call, says):
    with pytest.raises(UserError, match=says):
        make("gpt2", n_layer=3).hidden_states(TOKENS, **call)


@ANY
def test_a_prompt_that_is_asked_often_is_read_once(kind, monkeypatch):
    model = make(kind)
    a, b = ids(7, 5)
    read = []
    whole = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda x, *args, **kw: read.append(x.tolist()) or whole(x, *args, **kw))
    prompts = [a, b, a, a, b]
    answers = generate(model, prompts, 5, temperature=0)
    assert sorted(read[0]) == sorted(pad([a, b]).tolist()) and all(len(row) == 1 for part in read[1:] for row in part)
    assert answers == [generate(model, [prompt], 5, temperature=0)[0] for prompt in prompts]
    uniforms = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    drawn = generate(model, prompts, 5, uniforms=uniforms)
    assert drawn == [generate(model, [prompt], 5, uniforms=uniforms[[i]])[0] for i, prompt in enumerate(prompts)]
    assert len(set(map(tuple, drawn))) > 2
