"""The same work done plainly, and in three other libraries as their documentation does it.

All run a full forward pass with a hook. They give the losses of vectors added after a block, and the residual stream
at all positions. A library takes one vector at a time; the plain hook takes them all in one pass, copies of the prompts
beside each other. Weights need no gradients in any of them, and only the rows of the answers go through the softmax.
"""

import torch

from nb_utils.models import Model

PASS = 4 << 30  # bytes of logits in one pass of the plain hook


class Peer:
    """What they share: the prompts, where to steer, and the loss from the logits, all where the model is."""

    def __init__(self, model: Model, prompts, layer: int, answer_tokens: int = 2):
        self.layer, self.n, self.device = layer, len(prompts), model.device
        # Padding stands on the right, where a causal model cannot see it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids) for p in prompts], batch_first=True)
        spots = [(i, len(p.ids) - len(p.answer) + j - 1, token)
                 for i, p in enumerate(prompts) for j, token in enumerate(p.answer[:answer_tokens])]  # fmt: skip
        self.ids, self.positions = ids.to(self.device), self.here(p.separators[-1] for p in prompts)
        self.row, self.column, self.labels = self.here(spots).T
        self.wrap(model)

    def here(self, values):
        return torch.tensor(list(values), device=self.device)

    def losses(self, vectors):
        """Return the mean summed NLL of each vector [n], differentiable, where the vectors are."""
        return torch.stack([self.nll(self.logits(vector)[None])[0] for vector in vectors.to(self.device)]).to(vectors)

    def nll(self, logits):
        """Return the loss of each of the passes ``logits`` [n, batch, position, vocab]."""
        log_probs = logits[:, self.row, self.column].float().log_softmax(-1)
        return -log_probs.gather(-1, self.labels.expand(len(logits), -1)[..., None]).sum((1, 2)) / self.n

    def steered(self, stream, vector):
        stream = stream.clone()
        stream[torch.arange(self.n, device=self.device), self.positions] += vector
        return stream


class PlainHook(Peer):
    """transformers and a hook of torch."""

    def wrap(self, model):
        self.hf, self.layout = model.hf, model.layout
        logits = self.ids.numel() * self.layout.n_vocab * 4
        self.at_a_time = max(1, PASS // logits)

    def losses(self, vectors):
        parts = vectors.to(self.device).split(self.at_a_time)
        return torch.cat([self.nll(self.all_logits(part)) for part in parts]).to(vectors)

    def all_logits(self, vectors):
        def steer(stream):
            passes = stream.unflatten(0, (len(vectors), self.n)).clone()
            passes[:, torch.arange(self.n, device=self.device), self.positions] += vectors[:, None]
            return passes.flatten(0, 1)

        with self.layout.hooked(self.layer, steer):
            logits = self.hf(self.ids.repeat(len(vectors), 1), use_cache=False).logits
        return logits.unflatten(0, (len(vectors), self.n))

    def stream(self):
        kept = []
        with self.layout.hooked(self.layer, kept.append):
            self.hf(self.ids, use_cache=False)
        return kept[0]


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

        self.cap = model.layout.cap
        self.lm = LanguageModel(model.to(model.dtype).hf, tokenizer=model.tokenizer)

    def logits(self, vector):
        with self.lm.trace({"input_ids": self.ids}):
            block = self.lm.model.layers[self.layer]
            block.output = self.steered(block.output, vector)
            logits = self.lm.lm_head.output.save()
        # The model caps what its head gives.
        return logits if not self.cap else torch.tanh(logits / self.cap) * self.cap

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


ALL = {"plain hook": PlainHook, "TransformerLens": TransformerLens, "nnsight": NNsight, "pyvene": PyVene}
