"""What the optimisation shortcut changes: ``python -m benchmarks.shortcut`` prints the table of `reproduce`.

Exact: single precision, softmax over the whole vocabulary. Shortcut: bf16, the 16,384 tokens that are likeliest with
and without examples; beside it those that are likeliest without them alone. The pruned vectors have followed the loss
that the shortcut leaves, as every vector of the book has: where its tokens are too few, that loss is too low.
"""

import pandas as pd
import torch

from nb_utils import cleaning, engine, models, prompts, saes, tasks, vectors

LAYER, PROMPTS, SIZES, RATE, STEPS = 10, 24, (100, 50, 30, 20), 0.1, 10


def main():
    exact = models.load("gemma-3-270m")
    fast = exact.to(torch.bfloat16)
    sae, rows = saes.load(exact, "shipped", LAYER), []
    for task in ("antonyms", "en_es", "en_de", "country_capital"):
        splits = tasks.split(tasks.load(task))
        at = vectors.separators(exact, splits.vector, [LAYER])

        def site(model, shown):
            return engine.Site.prepare(model, shown, answer_tokens=2)

        tok, judged = exact.tokenizer, splits.validation[:PROMPTS]
        train, judge = prompts.zero_shot(tok, splits.train[:PROMPTS]), prompts.zero_shot(tok, judged)
        shown = prompts.few_shot(tok, splits.vector, judged, 16, seed=0)
        plain = site(fast, train), site(fast, judge)
        words = {"shortcut": (*plain, site(fast, shown)), "without examples": plain}
        words = {name: engine.vocabulary(*sites) for name, sites in words.items()}
        start = vectors.contrast_codes(at, LAYER, sae).codes[None]
        named = {"centred": vectors.centred_task_vector(at, LAYER), "task vector": vectors.task_vector(at, LAYER)}
        for name, tokens in words.items():
            problem = cleaning.Problem(*plain, LAYER, vocabulary=tokens)
            named[f"pruned, {name}"] = cleaning.prune_with_refit(problem, sae, start, SIZES, RATE, STEPS)[0][-1].vector
        found = {}
        ways = {"exact": (site(exact, train), None)} | {name: (plain[0], tokens) for name, tokens in words.items()}
        for name, (where, tokens) in ways.items():
            free = torch.stack(list(named.values())).requires_grad_()
            losses = where.loss(free, LAYER, vocabulary=tokens)
            losses.sum().backward()
            found[name] = losses.detach(), free.grad
        cosine = torch.cosine_similarity(found["exact"][1], found["shortcut"][1])
        rows += [
            {"task": task, "vector": vector, **{name: losses[i].item() for name, (losses, _) in found.items()},
             "cosine of the gradients": cosine[i].item()}
            for i, vector in enumerate(named)
        ]
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
