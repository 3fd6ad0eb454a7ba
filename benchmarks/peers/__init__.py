"""What other quantizers make of the same model, measured by our evaluation.

    make peers                                   # all of them, then the table and the picture in docs/
    python -m benchmarks.peers.row hqq-2-64 ...  # one of them

`recipes.py` lists them. A peer runs in an environment of its own (`environments/<name>.txt` pins it), through a script
`with_<peer>.py`, and leaves a plain Hugging Face folder; what is measured on that is in `row.py`.
"""
