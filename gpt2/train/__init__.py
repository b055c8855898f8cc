"""A training run.

config.py       its options; start.py: starts or resumes a run
trainer.py      the loop; optim.py: AdamW and the learning rate; signals.py: Ctrl-C
pretrained.py   weights to start from
metrics.py      the progress bar, metrics.jsonl and loss.png
run_folder.py   reads the folder of a run; best.py: its weights with the lowest loss
"""
