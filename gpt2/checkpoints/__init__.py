"""Model files. Every format is read into, and written from, a Config and a state.

weights.py      the state: names, shapes and checks, the same for every format
huggingface.py, nanogpt.py, llmc.py, checkpoint.py (our runs)    one format each
hub.py          published models by name
convert.py      detects the format of a file, and writes a model in another format
"""
