"""The microscope: typed prompts and their sentences, and numbers that a plain forward pass gives too."""

import pytest
import torch

from nb_utils import engine, saes
from nb_utils.show import microscope
from nb_utils.show.microscope import MicroscopeError

LAYER = 2


@pytest.fixture(scope="module")
def sae(tiny):
    return saes.random(tiny, LAYER)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"), ("  \n ", "is empty"), ("hot", "Line 1 has no separator"),
        ("up -> down\nhot", "Line 2 has no separator"), ("-> cold", "nothing before its separator"),
        ("up ->\nhot ->", "Line 1 is an example without an answer"), ("hot -> cold", "goes on after its separator"),
        ("x" * 3000 + " ->", "3,003 characters"), ("a<bos>b ->", "special token <bos>"), ("\ud800 ->", "cannot read"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_used_is_refused_in_one_sentence(tiny, text, says):
    with pytest.raises(MicroscopeError, match=says) as caught:
        microscope.prompt(tiny.tokenizer, text)
    assert "\n" not in str(caught.value)


def test_a_typed_prompt_has_its_separators_outputs_and_answer(tiny):
    read = microscope.prompt(tiny.tokenizer, " up->down \nhot  ->  ", "cold")
    assert tiny.tokenizer.decode(read.ids) == "<bos>up -> down\nhot -> cold"
    assert [microscope.pieces(tiny.tokenizer, [read.ids[i]]) for i in read.separators] == [[">"], [">"]]
    assert tiny.tokenizer.decode(read.answer) == " cold"


def plain(model, ids, vector, position):
    """Log-probabilities at the last of ``ids`` with the vector added at ``position``, through TransformerLens."""

    def steer(stream, hook):
        stream[:, position] += vector
        return stream

    hooks = [(f"blocks.{LAYER}.hook_resid_post", steer)]
    return model.bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0].log_softmax(-1)


@torch.no_grad()
def test_a_view_equals_a_plain_forward_pass(tiny):
    read = microscope.prompt(tiny.tokenizer, "up -> down\nhot ->", "cold")
    vectors = torch.randn(3, tiny.d_model, generator=torch.Generator().manual_seed(0))
    site = engine.Site.prepare(tiny, [read])
    for vector, (view,) in zip(vectors, microscope.views(site, vectors, LAYER), strict=True):
        here = len(read.ids) - len(read.answer) - 1
        expected = plain(tiny, read.ids, vector, read.separators[-1])
        both = expected[here, read.answer[0]] + expected[here + 1, read.answer[1]]
        assert view.loss == pytest.approx(-float(both), abs=1e-4)
        assert view.rank == 1 + int((expected[here] > expected[here, read.answer[0]]).sum())
        top = expected[here].exp().topk(5)
        assert [token for token, _ in view.top] == top.indices.tolist()
        assert [share for _, share in view.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_activations_are_the_codes_of_the_residual_stream_at_each_token(tiny, sae):
    read = microscope.prompt(tiny.tokenizer, "up -> down\nhot ->")
    found = microscope.activations(tiny, sae, read, [3, 5])
    end = read.separators[-1] + 1
    expected = sae.encode(engine.residuals(tiny, [read], [tuple(range(end))], [LAYER])[LAYER])
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], expected[1:, [3, 5]])
    assert found[1:].any()


@pytest.mark.parametrize("latent", [-1, 64, 10**9])
def test_an_unknown_latent_is_refused_in_one_sentence(sae, latent):
    with pytest.raises(MicroscopeError, match=f"no latent {latent} after block 2"):
        microscope.direction(sae, latent)
