"""Speed and memory of every case in benchmarks/cases.py, beside what a user would write in plain torch.

`python -m dae_fast bench` prints the table and writes the CSV; `pytest benchmarks/` is the pytest-benchmark form.
"""
