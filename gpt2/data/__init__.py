"""Turns text into batches of token ids.

tokenizer.py        text to token ids and back; tokenizers.py: by name, and from files
bytelevel.py, hf_tokenizer.py, tiktoken_file.py, nanogpt_meta.py    the formats of their files
documents.py        text from files, folders and standard input; reference_text.py: the default
shards.py           token ids on disk; prepare.py writes them from text
batches.py          what a training step reads; digest.py: detects data that has changed
"""
