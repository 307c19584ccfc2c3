"""Shared parts that no paper claims as its own: data, layers, training, metrics and pictures."""
