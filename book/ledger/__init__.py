"""The ledger: what the book claims, and what decides it. Nothing here is a result: those come from the tables.

One file a page, NN_name.yml, and pages.yml for what stands on several pages or on others than findings. Each has:

claims: one entry each; `id` (or `number`) names a function of a module of `numbers` that computes the number.
  `holds` is the side of a bound that the number must be on: with its whole 95 % interval and three quarters of the
  tasks (it holds), with its interval only (mostly), with an interval that contains the bound (undecided), or else it
  fails. `decides` says every choice, and may name a part of `claims.Book` in {braces}; vectors are there as their
  block.
sentences: a number typed in prose, as it stands there (`says`), and what answers for it: a `number` with its `holds`
  (and the `verdict`, if it is another than that it holds), a `setting` of the runs or a `constant` of a module with its
  value (`is`), or the source that is `cited`.
plain: phrases whose numbers state no result, on any page.
"""
