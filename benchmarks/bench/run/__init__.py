"""The jobs of run_all.py (plan.py), and the processes that run them (processes.py)."""
