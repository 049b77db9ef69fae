"""The same work in three other libraries, each used as its documentation does: a full forward pass with a hook.

Every peer gives the losses of vectors added after a block, one vector at a time, and the residual stream at some
positions. Weights need no gradients in any of them, and only the rows of the answers go through the softmax.
"""

import torch

from nb_utils.models import Model


def _padded(prompts):
    """Stack prompts, padded on the right, where a causal model cannot see it."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in prompts], batch_first=True)


class Peer:
    """What the three share: the prompts, where to steer, and the loss from the logits."""

    def __init__(self, model: Model, prompts, layer: int, answer_tokens: int = 2):
        self.ids, self.layer, self.n = _padded(prompts), layer, len(prompts)
        self.positions = torch.tensor([p.separators[-1] for p in prompts])
        spots = [(i, len(p.ids) - len(p.answer) + j - 1, token)
                 for i, p in enumerate(prompts) for j, token in enumerate(p.answer[:answer_tokens])]  # fmt: skip
        self.row, self.column, self.labels = torch.tensor(spots).T
        self.wrap(model)

    def losses(self, vectors):
        """Return the mean summed NLL of each vector [n], differentiable."""
        return torch.stack([self.nll(self.logits(vector)) for vector in vectors])

    def nll(self, logits):
        log_probs = logits[self.row, self.column].log_softmax(-1)
        return -log_probs.gather(-1, self.labels[:, None]).sum() / self.n

    def steered(self, stream, vector):
        stream = stream.clone()
        stream[torch.arange(self.n), self.positions] += vector
        return stream


class TransformerLens(Peer):
    def wrap(self, model):
        self.bridge, self.hook = model.bridge, f"blocks.{self.layer}.hook_resid_post"

    def logits(self, vector):
        hooks = [(self.hook, lambda stream, hook: self.steered(stream, vector))]
        return self.bridge.run_with_hooks(self.ids, fwd_hooks=hooks)

    def stream(self):
        return self.bridge.run_with_cache(self.ids, names_filter=self.hook)[1][self.hook]


class NNsight(Peer):
    def wrap(self, model):
        from nnsight import LanguageModel

        self.lm = LanguageModel(model.to(model.dtype).hf, tokenizer=model.tokenizer)

    def logits(self, vector):
        with self.lm.trace({"input_ids": self.ids}):
            block = self.lm.model.layers[self.layer]
            block.output = self.steered(block.output, vector)
            logits = self.lm.lm_head.output.save()
        return logits

    def stream(self):
        with self.lm.trace({"input_ids": self.ids}):
            stream = self.lm.model.layers[self.layer].output.save()
        return stream


class PyVene(Peer):
    def wrap(self, model):
        import pyvene

        peer = self

        class Add(pyvene.ConstantSourceIntervention):
            def forward(self, base, source=None, subspaces=None, **_):
                return peer.steered(base, peer.vector)

        class Keep(pyvene.ConstantSourceIntervention):
            def forward(self, base, source=None, subspaces=None, **_):
                peer.kept = base
                return base

        place = {"component": f"model.layers[{self.layer}].output"}
        own = [model.to(model.dtype).hf for _ in range(2)]
        self.adding = pyvene.IntervenableModel([{**place, "intervention": Add(keep_last_dim=True)}], model=own[0])
        self.keeping = pyvene.IntervenableModel([{**place, "intervention": Keep(keep_last_dim=True)}], model=own[1])

    def logits(self, vector):
        self.vector = vector
        return self.adding({"input_ids": self.ids})[1].logits

    def stream(self):
        self.keeping({"input_ids": self.ids})
        return self.kept


ALL = {"TransformerLens": TransformerLens, "nnsight": NNsight, "pyvene": PyVene}
