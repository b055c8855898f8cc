"""Code that the benchmark scripts share.

harness.py         a script per op: check against float64, then time
contenders.py      backends and peers; clock.py: their times and the limits of the machine
result.py          one result, and tables of them; result_file.py: the JSON file of a running script
peers.py           other libraries' kernels; models.py, generators.py: their GPT-2s
environment.py     the machine and its versions; options.py: the scripts' flags
step_profile.py    the parts of a training step's time
host/              time on the host: of a call, and of a step
report/            goals, plots, README's pictures, the report of a machine
run/               run_all.py's plan and processes
"""
