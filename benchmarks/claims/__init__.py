"""The papers' claims, tried on the generated datasets: python -m benchmarks.claims."""
