"""Training files of other tools: what their keys mean here (the tables), and how their settings become a sweep.

Sections of a table:

- `recognised_by`: keys by one of which a file of the tool is known.
- `taken`: for each of their keys our dotted key, or a fact (`recipe.epochs`) that is combined with others. A mapping
  has `to`; `values`, our value, or several settings, for each of theirs; `otherwise`, what it means that another value
  is not followed; `refuse`, an expression of values for which no sweep is drafted, and `why`.
- `defaults`: what the tool takes for a missing key; for TRL by the stage.
- `no_effect`, `not_taken`, `refused`: for each reason, or what it changes, the keys.
- `data_keys`, `data_set`, `types`, `pair_types`: keys that name data, the keys of one data set, and its types.
- `alpha_over_rank`: the factor by which a missing α follows from the rank.
- `nested`: keys whose own keys are read as `group.key`. `texts`: our settings for prompts that are texts.
- `decided`: for each key of ours that a sweep decides, their key.
- `must_agree`, `may_differ`: our keys with which a decided rate holds, and those that move it little, by their name.
"""
