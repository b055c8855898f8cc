"""Measures how well a model predicts text: scoring.py (the loss of every token, and perplexity)
and multiple_choice.py."""
