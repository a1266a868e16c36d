"""From files and the hub to checked, split rows. `lorasweep.data.read_source` chooses among what is here.

`files` finds files and reads their lines, `tables` makes columns of them, `hub` those of a hub data set. `labelled`,
`conversations` and `documents` check the rows of a form, `labels` turns labels into numbers, and `splitting` assigns
rows to splits.
"""
