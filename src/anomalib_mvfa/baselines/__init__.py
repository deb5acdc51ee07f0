"""Models to compare MVFA with, made of its parts."""
