"""Robust training from weak adversaries."""
