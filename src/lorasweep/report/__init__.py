"""The report of a sweep, made from records alone: terminal table, CSV, JSON, one HTML page and TensorBoard's files.

`read_findings` reads a folder once; `write_report` and `render_terminal` show the findings. Nothing here imports torch.

sweep_data              a sweep's folder: subjects with their settings, trials and confirm runs
evidence                the test scores of subjects, and the rows of the answers to the sweep's questions
caveats                 whether the trials beat an answer that needs no training, and whether arms were treated alike
recommend, next_step    the settings to use, and the command for each open answer
facts                   all of this together, as values
text                    the words for all of it
figures, page, terminal, write
                        the report as a person or a program reads it
"""
