"""Models to compare MVFA with."""
