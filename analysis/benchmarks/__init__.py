"""Programs that time the library: python -m analysis.benchmarks.overhead, and the others here."""
