"""Keys without their positions, and put at other ones: rotary embeddings of every kind."""

import pytest
import torch
from torch import nn

from r3mem_fast import MomentumCoupling, make_reversible
from r3mem_fast.memory.rotary import Rotation, is_rotary
from r3mem_fast.reversible.convert import reversible_layers, text_config
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, build

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
ROTARY = [family for family in [*EXACT_FAMILIES, *GENERIC_FAMILIES] if family not in ("gpt2", "opt")]
CASES = [(family, {}) for family in ROTARY]
CASES += [("llama", {"rope_parameters": parameters}) for parameters in (YARN, LLAMA3)]


def rotation_of(family, settings, dtype=torch.float32):
    model = make_reversible(build(family, dtype=dtype, **settings), MomentumCoupling(fraction_bits=20))
    stack, layers = reversible_layers(model)
    decoder = layers[0].reversible.decoder
    return model, decoder, Rotation(decoder, layers, stack.route.order, text_config(model.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family, settings", CASES)
def test_keys_moved_to_other_positions_are_those_computed_there(family, settings, dtype):
    """As the model's own attention has them in its cache, attention scaling (YaRN) and partial rotation included."""
    model, _, rotation = rotation_of(family, settings, dtype)
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    with torch.no_grad():
        layer_keys = [
            [layer.keys for layer in model(ids, position_ids=positions + shift, use_cache=True).past_key_values.layers]
            for shift in (0, 60)
        ]
    tolerance = 4 * torch.finfo(dtype).eps
    for index, (there, moved) in enumerate(zip(*layer_keys, strict=True)):
        if index:  # only the first layer's are the same but for positions, to the last bit before rotation
            break
        plain = rotation.unrotated(there, rotation.tables(positions, there)(index))
        again = rotation.rotated(plain, rotation.tables(positions + 60, there)(index))
        assert (again - moved).abs().max() <= tolerance * moved.abs().max()
        back = rotation.rotated(plain, rotation.tables(positions, there)(index))
        assert (back - there).abs().max() <= tolerance * there.abs().max()
        assert plain.dtype == dtype
        assert not torch.allclose(there, moved, atol=1e-2 * moved.abs().max().item())


@pytest.mark.parametrize("family, settings", CASES)
def test_each_key_goes_to_a_place_of_its_own_and_back(family, settings):
    _, decoder, rotation = rotation_of(family, settings)
    generator = torch.Generator().manual_seed(0)
    dim = decoder.layers[0].self_attn.head_dim if hasattr(decoder.layers[0], "self_attn") else 8
    keys = torch.randn(2, 2, 5, dim, generator=generator)
    places = torch.randint(0, 60, (2, 2, 5), generator=generator)
    tables = rotation.tables(torch.arange(60)[None], keys)(0)
    there = rotation.rotated_to(keys, tables, places)
    assert not torch.allclose(there, keys, atol=0.1)
    torch.testing.assert_close(rotation.unrotated_from(there, tables, places), keys)
    one = rotation.rotated(keys[1:, 1:, 3:4], rotation.tables(places[1:, 1, 3:4], keys)(0))
    torch.testing.assert_close(there[1:, 1:, 3:4], one)


def test_frequencies_that_depend_on_the_longest_row():
    """As dynamic scaling has them: a memory's keys are rotated by those of the tokens that read it."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    _, decoder, rotation = rotation_of("llama", {"rope_parameters": dynamic, "max_position_embeddings": 32})
    keys, places = torch.randn(1, 2, 3, 8), torch.arange(3)[None]
    alone = rotation.tables(places, keys)(0)
    tokens = torch.arange(3, 100)[None]
    together = rotation.tables(places, keys, seen_with=tokens)(0)
    expected = decoder.rotary_emb(keys, torch.arange(100)[None])
    assert not torch.equal(together[0], alone[0])
    assert all(torch.equal(a, b[:, :3]) for a, b in zip(together, expected, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_not_moved(family):
    _, decoder, rotation = rotation_of(family, {})
    keys = torch.randn(2, 4, 3, 8)
    tables = rotation.tables(torch.arange(3)[None], keys)(0)
    assert not is_rotary(decoder)
    assert rotation.rotated(keys, tables) is keys and rotation.unrotated(keys, tables) is keys


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="has positions of a kind that is not known here"):
        is_rotary(nn.Linear(2, 2))
