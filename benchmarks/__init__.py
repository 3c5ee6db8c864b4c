"""Programs that measure: `python -m benchmarks.NAME [--quick] [--out FILE]`. Baselines stand in `baselines/`."""
