"""Training files of other tools: what their keys mean here (the tables), and how their settings become a sweep.

Sections of a tool in `config/other_names.yaml`, which `help` and errors read too:

- `recognised_by`: keys of which each shows that a file is one of the tool.
- `followed`: for each of their keys our dotted key, or a fact (`recipe.epochs`) that is combined with others. Instead
  of the key, a mapping may have `to` (our key), `values` (for each of their values ours, or several settings),
  `otherwise` (why any other value is not followed), and `refuse` (values for which no sweep is drafted) with `why`.
- `defaults`: what the tool takes for a missing key; for TRL by the stage.
- `refused`, `not_followed`, `patterns`: for each reason the keys, which may be patterns such as `wandb_*`.
- `data_keys`, `data_set`, `types`, `pair_types`: keys that name data, the keys of one data set, and its types.
- `alpha_over_rank`: the factor by which a missing α follows from the rank.
- `nested`: keys whose own keys are read as `group.key`. `texts`: our settings for prompts that are texts.
- `all_linear`: their keys by which LoRA adapts all linear layers.

The section `common` says which of our keys `export --into` changes, and which must agree with the run.
"""
