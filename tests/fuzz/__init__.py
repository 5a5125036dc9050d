"""Coverage-guided fuzzing of what reads files: `fuzz.py` for Python, `native.sh` for the shard reader."""
