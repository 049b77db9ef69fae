"""What the optimisation shortcut changes: ``python -m benchmarks.shortcut`` prints the table of `reproduce`.

Exact: single precision, softmax over the whole vocabulary. Shortcut: bf16, the 16,384 likeliest tokens.
"""

import pandas as pd
import torch

from nb_utils import engine, models, prompts, tasks, vectors

LAYER, PROMPTS = 10, 24


def main():
    exact = models.load("gemma-3-270m")
    fast = exact.to(torch.bfloat16)
    rows = []
    for task in ("antonyms", "en_es", "country_capital"):
        splits = tasks.split(tasks.load(task))
        at = vectors.separators(exact, splits.vector, [LAYER])
        named = {"centred": vectors.centred_task_vector(at, LAYER), "task vector": vectors.task_vector(at, LAYER)}

        def site(model, pairs):
            return engine.Site.prepare(model, prompts.zero_shot(model.tokenizer, pairs), answer_tokens=2)

        train = site(fast, splits.train[:PROMPTS])
        vocabulary = engine.vocabulary(train, site(fast, splits.validation[:PROMPTS]))
        found = []
        for where, tokens in ((site(exact, splits.train[:PROMPTS]), None), (train, vocabulary)):
            free = torch.stack(list(named.values())).requires_grad_()
            losses = where.loss(free, LAYER, vocabulary=tokens)
            losses.sum().backward()
            found.append((losses.detach(), free.grad))
        cosine = torch.cosine_similarity(found[0][1], found[1][1])
        rows += [
            {"task": task, "vector": name, "exact": found[0][0][i].item(), "shortcut": found[1][0][i].item(),
             "cosine of the gradients": cosine[i].item()}
            for i, name in enumerate(named)
        ]
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
