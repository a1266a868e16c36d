"""The report of a sweep, made from records alone: terminal table, CSV, JSON, one HTML page and TensorBoard's files.

`read_findings` reads a folder once; `write_report` and `render_terminal` show the findings. Nothing here imports torch.

sweep_data          a sweep's folder: subjects with their trials and confirm runs
evidence            the test scores of subjects, the answers to the sweep's questions, and the outcome of each arm
caveats             whether the trials beat an answer that needs no training, and whether arms were treated alike
recommend           the settings to use
next_step           the command for each open question
facts               all of this together, as values
text                these values in words
terminal, page, figures, summary, write
                    the report as a person or a program reads it
"""
