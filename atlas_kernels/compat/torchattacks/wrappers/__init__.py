"""Attacks that are made of attacks."""
