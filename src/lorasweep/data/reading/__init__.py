"""From files and the hub to checked, split examples. `lorasweep.data.read_source` chooses among what is here.

`files` finds files, `tables` makes columns of them, `hub` loads hub data sets. `labelled`, `conversations` and
`documents` check the examples, `labels` turns labels into numbers, and `splitting` assigns examples to splits.
"""
